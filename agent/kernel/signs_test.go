package kernel

import (
	"testing"
	"time"
)

func TestSharedCred(t *testing.T) {
	const init = VirtAddr(0x1000)
	task := func(pid int, cred VirtAddr, f func(*Task)) Task {
		x := Task{PID: pid, TGID: pid, Cred: cred, State: "S", Start: time.Duration(pid)}
		if f != nil {
			f(&x)
		}
		return x
	}
	kthread := func(t *Task) { t.KThread = true }
	for _, tt := range []struct {
		name  string
		tasks []Task
		want  []int // the PIDs of those who have what is not theirs
	}{
		{"each has its own", []Task{task(1, 0x2000, nil), task(2, 0x3000, nil)}, nil},
		{"threads", []Task{task(1, 0x2000, nil), task(2, 0x2000, func(t *Task) { t.TGID = 1 })}, nil},
		{"the younger one, wherever it is listed", []Task{task(9, 0x2000, nil), task(1, 0x2000, nil)}, []int{9}},
		{"two have taken those of one", []Task{task(1, 0x2000, nil), task(8, 0x2000, nil), task(9, 0x2000, nil)}, []int{8, 9}},
		{"the kernel's own", []Task{task(0, init, kthread), task(2, init, kthread), task(7, init, nil)}, []int{7}},
		{"those of a thread of the kernel", []Task{task(2, 0x2000, kthread), task(7, 0x2000, nil)}, []int{7}},
		{"one that has ended", []Task{task(1, 0x2000, nil), task(7, 0x2000, func(t *Task) { t.State = "Z" })}, nil},
	} {
		var s Signs
		owners := make(map[VirtAddr]*Task)
		for i := range tt.tasks {
			s.sharedCred(owners, &tt.tasks[i], init)
		}
		var got []int
		for _, x := range s.Shared {
			got = append(got, x.Task.PID)
		}
		if len(got) != len(tt.want) {
			t.Errorf("%s: %v; want %v", tt.name, got, tt.want)
			continue
		}
		for i := range got {
			if got[i] != tt.want[i] {
				t.Errorf("%s: %v; want %v", tt.name, got, tt.want)
			}
		}
	}
}
