package kernel

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// TestClose has the memory of a closed View used again: the next one answers the same, the closed one nothing.
func TestClose(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			img, _ := openRecorded(t, rec)
			list := func(v *View) (tasks []Task, modules []Module) {
				for x, err := range v.Tasks() {
					if err != nil {
						t.Fatal(err)
					}
					tasks = append(tasks, x)
				}
				for x, err := range v.Modules() {
					if err != nil {
						t.Fatal(err)
					}
					modules = append(modules, x)
				}
				return tasks, modules
			}
			first := img.View(t.Context())
			tasks, modules := list(first)
			for range 3 {
				closed := img.View(t.Context())
				if _, err := drain(closed.Log()); err != nil {
					t.Fatal(err)
				}
				closed.Close()
				closed.Close()
				if n, err := drain(closed.Tasks()); !errors.Is(err, ErrClosed) || n != 0 {
					t.Errorf("a closed View lists %d tasks, %v", n, err)
				}
				v := img.View(t.Context()) // has the pages of the closed one
				againTasks, againModules := list(v)
				if d := cmp.Diff(tasks, againTasks) + cmp.Diff(modules, againModules, cmpopts.IgnoreUnexported(Module{})); d != "" {
					t.Errorf("-first View, +one that uses a closed one's memory\n%s", d)
				}
				if v.Cost().Pages == 0 {
					t.Error("it has read nothing itself")
				}
			}
			if again, _ := list(first); !cmp.Equal(tasks, again) {
				t.Error("the open View changed its answer")
			}
		})
	})
}

// TestUnreadThing looks at the fields of an object that cannot be read: they are zero, and nothing panics.
func TestUnreadThing(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		img, _ := openRecorded(t, rec)
		r := resolver{img: img}
		s := r.shape("task_struct", "stack", "mm")
		if r.err != nil {
			t.Fatal(r.err)
		}
		for _, at := range []VirtAddr{0, 8, ^VirtAddr(7), img.lay.text - 1<<30} {
			x, err := img.View(t.Context()).thing(s, at)
			if err == nil || x.ptr("mm") != 0 {
				t.Errorf("%s: the thing at %v has mm %v, %v; want an error", name, at, x.ptr("mm"), err)
			}
		}
		closed := img.View(t.Context())
		closed.Close()
		if x, err := closed.thing(s, img.lay.task.init); !errors.Is(err, ErrClosed) || x.ptr("stack") != 0 {
			t.Errorf("%s: a closed View has %v, %v", name, x.ptr("stack"), err)
		}
	})
}
