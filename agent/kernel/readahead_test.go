package kernel

import (
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// TestReadAheadHostile has the tree of PIDs lie: nodes that hold themselves, words that lead nowhere. Nothing of it may take long, or be said.
func TestReadAheadHostile(t *testing.T) {
	const nodes = 64
	m := make(flat, (nodes+1)*hostmem.PageSize)
	space := &addressSpace{linear: []linearRange{{0, VirtAddr(len(m)), 0}}}
	img := &Image{mem: &trips{Memory: m}, space: space, lay: &layout{}}
	img.lay.ahead = aheadLayout{slots: 8, slotsInXANodes: 64}
	for _, c := range []struct {
		name string
		slot func(node, i int) uint64
		want int
	}{
		{"a node of itself", func(node, i int) uint64 { return uint64(node*hostmem.PageSize) | 2 }, 0},
		{"nodes of all others", func(node, i int) uint64 { return uint64((1+i)*hostmem.PageSize) | 2 }, 0},
		{"nodes beyond memory", func(node, i int) uint64 { return 1<<40 | uint64(i)<<12 | 2 }, 0},
		{"values", func(node, i int) uint64 { return uint64(i)<<1 | 1 }, 0},
		{"leaves", func(node, i int) uint64 { return uint64(i+1) << 3 }, 64},
	} {
		for node := 1; node <= nodes; node++ {
			for i := range 64 {
				m.put64(node*hostmem.PageSize+8+8*i, c.slot(node, i))
			}
		}
		a := &readAhead{v: img.View(t.Context()), place: make(map[VirtAddr]int)}
		if got := a.leaves(hostmem.PageSize | 2); len(got) != c.want {
			t.Errorf("%s: %d leaves; want %d", c.name, len(got), c.want)
		}
	}
}

// TestReadAheadRecorded walks recorded tasks over a path that reads many pieces at once, of which the recordings lack what is ahead: the
// same tasks come out.
func TestReadAheadRecorded(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		img, mem := openRecorded(t, rec)
		var want []Task
		for task, err := range img.View(t.Context()).Tasks() {
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, task)
		}
		far := &trips{Memory: mem}
		n := 0
		for task, err := range img.with(far).View(t.Context()).Tasks() {
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if n >= len(want) || task != want[n] {
				t.Fatalf("%s: task %d is %+v", name, n, task)
			}
			n++
		}
		if n != len(want) {
			t.Errorf("%s: %d tasks; want %d", name, n, len(want))
		}
		t.Logf("%s: %d tasks in %d round trips", name, n, far.n.Load())
	})
}
