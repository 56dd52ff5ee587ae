package heal

import (
	"slices"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

func TestHeads(t *testing.T) {
	task := func(pid, parent int) kernel.Task { return kernel.Task{PID: pid, TGID: pid, PPID: parent} }
	for _, tt := range []struct {
		name string
		tree []kernel.Task // the youngest first
		want []int
	}{
		{"a chain", []kernel.Task{task(12, 11), task(11, 10), task(10, 1)}, []int{10}},
		{"orphans beside a family", []kernel.Task{task(14, 1), task(13, 12), task(12, 1), task(11, 99)}, []int{14, 12, 11}},
		{"each other's parents", []kernel.Task{task(11, 10), task(10, 11)}, []int{11, 10}},
	} {
		var got []int
		for _, x := range heads(tt.tree) {
			got = append(got, x.PID)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: heads() = %v; want %v", tt.name, got, tt.want)
		}
	}
}
