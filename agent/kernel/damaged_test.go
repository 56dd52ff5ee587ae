package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// patient is a recorded kernel whose memory a test changes.
type patient struct {
	t   *testing.T
	img *Image
	mem overlay
}

func newPatient(t *testing.T, rec *hostmem.Recording) *patient {
	img, _ := openRecorded(t, rec)
	mem := overlay{rec.Frame(frameAlive), make(map[hostmem.PhysAddr]byte)}
	return &patient{t, img.with(mem), mem}
}

func (p *patient) put(va VirtAddr, b []byte) {
	p.t.Helper()
	for i := range b {
		pa, err := p.img.View(p.t.Context()).Phys(va + VirtAddr(i))
		if err != nil {
			p.t.Fatal(err)
		}
		p.mem.bytes[pa] = b[i]
	}
}

func (p *patient) put64(va VirtAddr, v uint64) { p.put(va, binary.LittleEndian.AppendUint64(nil, v)) }
func (p *patient) put32(va VirtAddr, v uint32) { p.put(va, binary.LittleEndian.AppendUint32(nil, v)) }

// tasks returns the tasks by PID and how the walk ended.
func (p *patient) tasks() (map[int]Task, error) {
	all := make(map[int]Task)
	var last error
	for task, err := range p.img.View(p.t.Context()).Tasks() {
		if last = err; err == nil {
			if _, twice := all[task.PID]; twice {
				p.t.Errorf("PID %d twice", task.PID)
			}
			all[task.PID] = task
		}
	}
	return all, last
}

func TestTasksDamaged(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		healthy, _ := newPatient(t, rec).tasks()
		init, kthreadd := healthy[1].Addr, healthy[2].Addr
		var thread VirtAddr // of PID 1
		for _, task := range healthy {
			if task.TGID == 1 && task.PID != 1 {
				thread = task.Addr
			}
		}
		for _, c := range []struct {
			name   string
			damage func(p *patient, l *taskLayout)
			object string // of the *CorruptError; empty: none
			why    string
		}{
			{"cycle", func(p *patient, l *taskLayout) { p.put64(kthreadd+VirtAddr(l.tasks), uint64(init)+l.tasks) }, "task_struct", "twice in the list"},
			{"cycle of one", func(p *patient, l *taskLayout) { p.put64(init+VirtAddr(l.tasks), uint64(init)+l.tasks) }, "task_struct", "twice in the list"},
			{"next is NULL", func(p *patient, l *taskLayout) { p.put64(init+VirtAddr(l.tasks), 0) }, "task_struct", "next task"},
			{"next is poison", func(p *patient, l *taskLayout) { p.put64(init+VirtAddr(l.tasks), 0xdead000000000100) }, "task_struct", "next task"},
			{"next is unaligned", func(p *patient, l *taskLayout) { p.put64(init+VirtAddr(l.tasks), uint64(kthreadd)+l.tasks+1) }, "task_struct", "next task"},
			{"next is in a hole", func(p *patient, l *taskLayout) {
				p.put64(init+VirtAddr(l.tasks), uint64(p.img.space.linear[1].end)+0x1000)
			}, "task_struct", "points to no memory"},
			{"next is in user space", func(p *patient, l *taskLayout) { p.put64(init+VirtAddr(l.tasks), 0x7fff00001000) }, "task_struct", "next task"},
			{"PID", func(p *patient, l *taskLayout) { p.put32(kthreadd+VirtAddr(l.pid), 1<<30) }, "task_struct", "PID"},
			{"leader", func(p *patient, l *taskLayout) { p.put32(kthreadd+VirtAddr(l.pid), 3) }, "task_struct", "leads a process"},
			{"CPU", func(p *patient, l *taskLayout) { p.put32(kthreadd+VirtAddr(l.cpu), 2) }, "task_struct", "on CPU 2 of 2"},
			{"comm", func(p *patient, l *taskLayout) { p.put(kthreadd+VirtAddr(l.comm), []byte("sixteen letters.")) }, "task_struct", "comm"},
			{"parent", func(p *patient, l *taskLayout) { p.put64(kthreadd+VirtAddr(l.realParent), 8) }, "task_struct", "real_parent"},
			{"credentials in a hole", func(p *patient, l *taskLayout) {
				p.put64(kthreadd+VirtAddr(l.cred), uint64(p.img.space.linear[1].end)+0x1000)
			}, "cred", "points to no memory"},
			{"mm", func(p *patient, l *taskLayout) { p.put64(init+VirtAddr(l.mm), 4096) }, "task_struct", "mm"},
			{"threads do not end", func(p *patient, l *taskLayout) {
				p.put64(thread+VirtAddr(l.threadNode), uint64(thread)+l.threadNode)
			}, "task_struct", "twice in the list"},
			{"thread of another process", func(p *patient, l *taskLayout) {
				p.put64(init+VirtAddr(l.threadNode), uint64(kthreadd)+l.threadNode)
			}, "task_struct", "signal_struct"},
			{"init_task's PID", func(p *patient, l *taskLayout) { p.put32(l.init+VirtAddr(l.pid), 7) }, "init_task", "PID 7"},
			{"unlinked task", func(p *patient, l *taskLayout) { p.put64(kthreadd+VirtAddr(l.tasks)+8, listPoison2) }, "", ""},
			{"comm of control characters", func(p *patient, l *taskLayout) { p.put(kthreadd+VirtAddr(l.comm), []byte("a\x1b[31m\xff\x00")) }, "", ""},
		} {
			t.Run(name+"/"+c.name, func(t *testing.T) {
				p := newPatient(t, rec)
				c.damage(p, &p.img.lay.task)
				all, err := p.tasks()
				var corrupt *CorruptError
				switch {
				case c.object == "" && err != nil:
					t.Errorf("Tasks ended with %v", err)
				case c.object != "" && (!errors.As(err, &corrupt) || corrupt.Object != c.object || !strings.Contains(corrupt.Why, c.why)):
					t.Errorf("Tasks ended with %v; want a *CorruptError of %s: %s", err, c.object, c.why)
				}
				switch task, there := all[2]; c.name {
				case "unlinked task":
					if there || len(all) != len(healthy)-1 {
						t.Errorf("%d of %d tasks, the unlinked one among them: %v", len(all), len(healthy), there)
					}
				case "comm of control characters":
					if task.Comm != "a?[31m?" {
						t.Errorf("comm = %q", task.Comm)
					}
				}
			})
		}
	})
}

func TestStateLetter(t *testing.T) {
	for _, c := range []struct {
		state, exit uint32
		want        string
	}{
		{0, 0, "R"}, {1, 0, "S"}, {2, 0, "D"}, {0x402, 0, "I"}, {4, 0, "T"}, {8, 0, "t"}, {0x80, 0x10, "X"}, {0x80, 0x20, "Z"}, {0x80, 0x30, "Z"},
		{0x40, 0, "P"}, {0x102, 0, "D"}, {0x2001, 0, "S"}, {0x8000, 0, "D"}, {0x1000, 0, "D"}, {0x8402, 0, "D"}, {^uint32(0), ^uint32(0), "D"},
	} {
		if got := stateLetter(c.state, c.exit); got != c.want {
			t.Errorf("stateLetter(%#x, %#x) = %s; want %s", c.state, c.exit, got, c.want)
		}
	}
}

func TestHeartbeatDamaged(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			p := newPatient(t, rec)
			symbol := func(name string) VirtAddr {
				va, err := p.img.Symbol(name)
				if err != nil {
					t.Fatal(err)
				}
				return va
			}
			field := func(typ, path string) VirtAddr {
				f, err := p.img.Field(typ, path)
				if err != nil {
					t.Fatal(err)
				}
				return VirtAddr(f.Offset)
			}
			rq, err := p.img.PerCPU("runqueues", 1)
			if err != nil {
				t.Fatal(err)
			}
			curr := rq + field("rq", "curr")
			beat := func() (Heartbeat, error) { return p.img.View(t.Context()).Heartbeat() }

			// A task that is nowhere is an error, unless its CPU is offline.
			p.put64(curr, uint64(p.img.space.linear[1].end)+64)
			var corrupt *CorruptError
			if h, err := beat(); !errors.As(err, &corrupt) {
				t.Errorf("Heartbeat = %+v, %v; want a *CorruptError", h, err)
			}
			p.put64(curr, 12345)
			if h, err := beat(); !errors.As(err, &corrupt) || corrupt.Object != "task_struct" {
				t.Errorf("Heartbeat = %+v, %v; want a *CorruptError", h, err)
			}
			// So is one whose PID nobody can have: here it is the run queue itself.
			p.put64(curr, uint64(rq))
			p.put32(rq+field("task_struct", "pid"), 0x8372bd9c)
			if h, err := beat(); !errors.As(err, &corrupt) || !strings.Contains(corrupt.Why, "PID") {
				t.Errorf("Heartbeat = %+v, %v; want a *CorruptError about the PID", h, err)
			}
			p.put64(symbol("__cpu_online_mask"), 1)
			h, err := beat()
			if err != nil || !h.CPUs[0].Online || h.CPUs[1].Online || h.CPUs[1].CurrComm != "" {
				t.Errorf("Heartbeat with a CPU offline = %+v, %v", h, err)
			}

			// A host that died while it wrote the clocks has clocks nevertheless.
			tk := p.img.lay.keeper.addr
			p.put32(tk, 0x1001)
			if again, err := beat(); err != nil || again.Mono != h.Mono {
				t.Errorf("Heartbeat with a stuck timekeeper = %+v, %v", again, err)
			}
			// One that writes them all the time has none that can be told.
			busy := &writing{Memory: p.mem, at: p.img.lay.keeper.pa}
			if h, err := p.img.with(busy).View(t.Context()).Heartbeat(); !errors.Is(err, ErrTorn) {
				t.Errorf("Heartbeat while the timekeeper is written = %+v, %v; want ErrTorn", h, err)
			}

			p.put32(symbol("panic_cpu"), 77)
			if s, err := p.img.View(t.Context()).Panic(); !errors.As(err, &corrupt) || s.Panicked {
				t.Errorf("Panic on CPU 77 = %+v, %v; want a *CorruptError", s, err)
			}
		})
	})
}

// writing is a memory with a sequence count that moves with each look.
type writing struct {
	hostmem.Memory
	at hostmem.PhysAddr
	n  atomic.Uint32
}

func (m *writing) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.Memory.ReadAt(b, off)
	if off == int64(m.at) && len(b) == 4 {
		binary.LittleEndian.PutUint32(b, m.n.Add(1))
	}
	return n, err
}

// dump is a memory with a VMCOREINFO of its own, like an ELF core.
type dump struct {
	hostmem.Memory
	text string
}

func (m dump) VMCOREINFO() []byte { return []byte(m.text) }

func TestOpenDump(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		img, _ := openRecorded(t, rec)
		got, err := Open(t.Context(), dump{rec.Frame(frameAlive), img.note.text}, Options{})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		note := img.Info().Note
		if _, err := img.Symbol("vmcoreinfo_note"); err != nil {
			note = 0 // nothing in the dump leads to it
		}
		if got.Info().BootID != img.Info().BootID || got.Info().Note != note {
			t.Errorf("%s: Info = %+v", name, got.Info())
		}
		if _, err := Open(t.Context(), dump{rec.Frame(frameAlive), "nonsense"}, Options{}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: Open with a bad note = %v", name, err)
		}
	})
}

func TestViewCost(t *testing.T) {
	m := make(flat, (viewPages+8)*hostmem.PageSize)
	for i := range viewPages + 8 {
		m.put64(i*hostmem.PageSize, uint64(i))
	}
	img := &Image{mem: m, space: &addressSpace{linear: []linearRange{{0, VirtAddr(len(m)) + 4096, 0}}}}
	v := img.View(context.Background())
	for round := range 2 {
		for i := range viewPages {
			if n, err := v.Uint64(VirtAddr(i * hostmem.PageSize)); err != nil || n != uint64(i) {
				t.Fatalf("round %d: page %d = %d, %v", round, i, n, err)
			}
		}
	}
	if c := v.Cost(); c.Pages != viewPages || c.Reads != viewPages || c.Bytes != viewPages*hostmem.PageSize {
		t.Errorf("cost = %+v; want each of %d pages once", c, viewPages)
	}
	// More pages than a View keeps: the oldest go.
	for i := range viewPages + 8 {
		if _, err := v.Uint32(VirtAddr(i * hostmem.PageSize)); err != nil {
			t.Fatal(err)
		}
	}
	if len(v.cache.pages) != viewPages {
		t.Errorf("View keeps %d pages", len(v.cache.pages))
	}
	// RAM may end within a page, and does end.
	short := &Image{mem: m[:hostmem.PageSize+100], space: img.space}
	v = short.View(context.Background())
	if err := v.ReadVirt(hostmem.PageSize-8, make([]byte, 64)); err != nil {
		t.Error(err)
	}
	if err := v.ReadVirt(hostmem.PageSize+64, make([]byte, 64)); !errors.Is(err, hostmem.ErrNotMapped) {
		t.Errorf("read across the end of RAM = %v", err)
	}
}

// TestEngine reads through a DMA engine: it works, and when the engine fails that is not blamed on the kernel.
func TestEngine(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			direct, _ := openRecorded(t, rec)
			var outcome atomic.Int32
			engine := hostmem.NewEngine(rec.Frame(frameAlive), hostmem.EngineOptions{
				Sleep:   func(time.Duration) {},
				Outcome: func(string, hostmem.Range) hostmem.Outcome { return hostmem.Outcome(outcome.Load()) },
			})
			defer engine.Close()
			img, err := Open(t.Context(), engine, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if img.Info().BootID != direct.Info().BootID {
				t.Errorf("Info = %+v", img.Info())
			}
			for _, c := range []struct {
				outcome hostmem.Outcome
				want    error
			}{{hostmem.NeverEnds, hostmem.ErrTimeout}, {hostmem.Aborts, hostmem.ErrAborted}, {hostmem.LosesLink, hostmem.ErrLinkDown}} {
				outcome.Store(int32(c.outcome))
				v := img.View(t.Context())
				_, beat := v.Heartbeat()
				_, panicked := v.Panic()
				_, open := Open(t.Context(), engine, Options{Hint: Hint{Note: img.Info().Note}})
				errs := map[string]error{"Heartbeat": beat, "Panic": panicked, "Open": open, "Prove": img.Prove(t.Context())}
				for _, err := range v.Tasks() {
					errs["Tasks"] = err
				}
				for _, err := range v.Log() {
					errs["Log"] = err
				}
				for what, err := range errs {
					var corrupt *CorruptError
					// A search passes over what the host refuses, and finds nothing then.
					if what == "Open" && errors.Is(err, ErrNotFound) {
						continue
					}
					if !errors.Is(err, c.want) || errors.As(err, &corrupt) || errors.Is(err, ErrGone) {
						t.Errorf("%s = %v; want %v", what, err, c.want)
					}
				}
			}
		})
	})
}
