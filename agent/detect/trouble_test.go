package detect

import (
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// signs makes a row of samples, one each half second, of what f says of each.
func signs(n int, f func(i int, s *kernel.Signs)) []kernel.Signs {
	out := make([]kernel.Signs, n)
	t0 := time.Unix(1_800_000_000, 0)
	for i := range out {
		out[i].At = t0.Add(time.Duration(i) * 500 * time.Millisecond)
		f(i, &out[i])
	}
	return out
}

func verdicts(fs []Finding) (n int) {
	for _, f := range fs {
		if !f.Suspicion {
			n++
		}
	}
	return n
}

func TestOops(t *testing.T) {
	d := oops(DefaultConfig())
	if fs := detect(t, d, &Pass{Signs: signs(3, func(int, *kernel.Signs) {})}); len(fs) > 0 {
		t.Errorf("none: %+v", fs)
	}
	fs := detect(t, d, &Pass{Signs: signs(3, func(_ int, s *kernel.Signs) { s.Oopses = 2 })})
	if len(fs) != 1 || fs[0].Key != "2" || fs[0].Confidence != 1 {
		t.Errorf("two: %+v", fs)
	}
}

func TestRCUStall(t *testing.T) {
	d := rcuStall(DefaultConfig())
	stuck := func(i int, s *kernel.Signs) { s.GracePeriod, s.Waiting, s.Holding = 401, true, []int{1} }
	for _, tt := range []struct {
		name string
		n    int
		f    func(int, *kernel.Signs)
		want int
	}{
		{"the same one for 15 s", 31, stuck, 1},
		{"the same one for 8 s", 17, stuck, 0},
		{"one after the other", 31, func(i int, s *kernel.Signs) { stuck(i, s); s.GracePeriod += uint64(i / 4 * 4) }, 0},
		{"none", 31, func(_ int, s *kernel.Signs) { s.GracePeriod = 400 }, 0},
		{"nobody looked meanwhile", 31, func(i int, s *kernel.Signs) {
			stuck(i, s)
			if i > 15 {
				s.At = s.At.Add(10 * time.Second)
			}
		}, 0},
	} {
		fs := detect(t, d, &Pass{Signs: signs(tt.n, tt.f)})
		if got := verdicts(fs); got != tt.want {
			t.Errorf("%s: %d verdicts: %+v", tt.name, got, fs)
		}
		if tt.want == 1 && (fs[0].Culprit.CPU == nil || *fs[0].Culprit.CPU != 1) {
			t.Errorf("%s: culprit %+v", tt.name, fs[0].Culprit)
		}
	}
}

func TestHungTask(t *testing.T) {
	c := DefaultConfig()
	c.HungFor = 10 * time.Second
	row := func(f func(i int, k *kernel.Task)) []TaskSample {
		var out []TaskSample
		for i := range 30 {
			k := kernel.Task{PID: 50, TGID: 50, Comm: "x", Start: time.Second, State: "D", Switches: 7}
			f(i, &k)
			out = append(out, TaskSample{At: time.Unix(1_800_000_000, 0).Add(time.Duration(i) * 500 * time.Millisecond), Tasks: []kernel.Task{k}})
		}
		return out
	}
	for _, tt := range []struct {
		name string
		f    func(int, *kernel.Task)
		want int
	}{
		{"all the time", func(int, *kernel.Task) {}, 1},
		{"woken now and then", func(i int, k *kernel.Task) { k.Switches += uint64(i / 10) }, 0},
		{"a moment of something else", func(i int, k *kernel.Task) {
			if i == 20 {
				k.State = "R"
			}
		}, 0},
		{"another under the same PID", func(i int, k *kernel.Task) {
			if i > 15 {
				k.Start = time.Minute
			}
		}, 0},
		{"sleeps", func(_ int, k *kernel.Task) { k.State = "S" }, 0},
		{"idles", func(_ int, k *kernel.Task) { k.State = "I" }, 0},
	} {
		if fs := detect(t, hungTask(c), &Pass{Tasks: row(tt.f)}); verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
	}
}

func TestTampering(t *testing.T) {
	d := tampering(DefaultConfig())
	hidden := kernel.Task{PID: 66, TGID: 66, Comm: "x", Start: time.Second}
	for _, tt := range []struct {
		name string
		f    func(int, *kernel.Signs)
		want int
	}{
		{"nothing", func(int, *kernel.Signs) {}, 0},
		{"a stray entry", func(i int, s *kernel.Signs) {
			if i >= 3 {
				s.Strays = []kernel.Stray{{Table: "sys_call_table[62]", Addr: 0x1000, To: 0xffffffffc0001000, Owner: "bad"}}
			}
		}, 1},
		{"tables of a host that is reset under the look", func(i int, s *kernel.Signs) {
			s.Strays = []kernel.Stray{{Table: "sys_call_table[62]", Addr: 0x1000, To: kernel.VirtAddr(i)}}
		}, 0},
		{"a hidden process with its threads", func(_ int, s *kernel.Signs) {
			thread := hidden
			thread.PID++
			s.Hidden = []kernel.Task{hidden, thread}
		}, 1},
		{"a hidden task", func(_ int, s *kernel.Signs) { s.Hidden = []kernel.Task{hidden} }, 1},
		{"tasks that just start", func(i int, s *kernel.Signs) {
			k := hidden
			k.PID += i
			s.Hidden = []kernel.Task{k}
		}, 0},
		{"a hidden module", func(_ int, s *kernel.Signs) { s.HiddenModules = []string{"bad"} }, 1},
		{"a probe with two handlers of a stranger's", func(_ int, s *kernel.Signs) {
			s.Hooks = []kernel.Hook{{Kind: "kprobe", Record: 0x1000, Place: "tcp4_seq_show", Member: "kprobe.pre_handler", At: 0x1040, To: 0x2000},
				{Kind: "kprobe", Record: 0x1000, Place: "tcp4_seq_show", Member: "kprobe.post_handler", At: 0x1048, To: 0x2100}}
		}, 1},
		{"a probe of a module that comes or goes", func(i int, s *kernel.Signs) {
			if i%2 == 0 {
				s.Hooks = []kernel.Hook{{Kind: "kprobe", Record: 0x1000, At: 0x1040, To: 0x2000}}
			}
		}, 0},
		{"an eBPF program that is replaced, and a map with others' functions", func(_ int, s *kernel.Signs) {
			s.Hooks = []kernel.Hook{{Kind: "eBPF program", Record: 0x1000, Place: "x (3)", Member: "bpf_prog.bpf_func", At: 0x1030, To: 0x2000, Was: 0x3000},
				{Kind: "eBPF map", Record: 0x4000, Place: "m (4)", Member: "bpf_map.ops", At: 0x4000, To: 0x2100}}
		}, 2},
		{"a hidden eBPF program that writes to processes", func(_ int, s *kernel.Signs) {
			x := kernel.BPFSuspect{Addr: 0x1000, ID: 3, Name: "x", Calls: []string{"bpf_probe_write_user"}}
			s.HiddenPrograms, s.HarmfulPrograms = []kernel.BPFSuspect{x}, []kernel.BPFSuspect{x}
		}, 2},
		{"two without a number", func(_ int, s *kernel.Signs) { s.HiddenPrograms = []kernel.BPFSuspect{{Addr: 0x1000}, {Addr: 0x2000}} }, 2},
		{"eBPF programs that just come or go", func(i int, s *kernel.Signs) {
			s.HiddenPrograms = []kernel.BPFSuspect{{Addr: 0x1000, ID: uint32(i + 1)}}
		}, 0},
		{"the kernel's credentials, and those of another", func(_ int, s *kernel.Signs) {
			s.Shared = []kernel.SharedCred{{Task: hidden, Owner: "the kernel itself"}, {Task: kernel.Task{PID: 67, TGID: 67}, Owner: `"y" (PID 2)`}}
		}, 2},
		{"shared for a moment", func(i int, s *kernel.Signs) {
			if i == 4 {
				s.Shared = []kernel.SharedCred{{Task: hidden}}
			}
		}, 0},
		{"shared by one after the other", func(i int, s *kernel.Signs) {
			s.Shared = []kernel.SharedCred{{Task: kernel.Task{PID: i, TGID: i}}}
		}, 0},
		{"a module that is just loaded", func(i int, s *kernel.Signs) {
			if i == 4 {
				s.HiddenModules = []string{"good"}
			}
		}, 0},
	} {
		if fs := detect(t, d, &Pass{Signs: signs(5, tt.f)}); verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d findings", tt.name, fs, tt.want)
		}
	}
}

// Who writes to processes may do so by right: that is said with less than hidden hands.
func TestTamperingBPF(t *testing.T) {
	x := kernel.BPFSuspect{Addr: 0x1000, ID: 3, Name: "x", UID: 7, Loaded: time.Minute, Calls: []string{"bpf_probe_write_user", "bpf_override_return"}}
	fs := detect(t, tampering(DefaultConfig()), &Pass{Signs: signs(5, func(_ int, s *kernel.Signs) { s.HarmfulPrograms = []kernel.BPFSuspect{x} })})
	if len(fs) != 1 || fs[0].Severity != Warning || fs[0].Confidence >= 0.9 || fs[0].Culprit.UID == nil || *fs[0].Culprit.UID != 7 || fs[0].Key != "bpf program 3 harmful" ||
		!strings.Contains(fs[0].Detail, "memory of processes") || !strings.Contains(fs[0].Detail, "errors") || !slices.Contains(fs[0].Evidence, Evidence{"calls", "bpf_probe_write_user, bpf_override_return"}) {
		t.Errorf("%+v", fs)
	}
}

// Of a process that has become root it is told once, by what says most.
func TestRisen(t *testing.T) {
	d := tampering(DefaultConfig())
	x := kernel.Task{PID: 66, TGID: 66, Comm: "x", Start: time.Second}
	p := &Pass{Signs: signs(5, func(int, *kernel.Signs) {}), Risen: []kernel.Task{x}}
	if fs := detect(t, d, p); verdicts(fs) != 1 || fs[0].Culprit.PID != 66 || !strings.Contains(fs[0].Title, "has become root") {
		t.Errorf("%+v", fs)
	}
	p.Signs = signs(5, func(_ int, s *kernel.Signs) { s.Shared = []kernel.SharedCred{{Task: x, Owner: "the kernel itself"}} })
	if fs := detect(t, d, p); verdicts(fs) != 1 || !strings.Contains(fs[0].Title, "the credentials of the kernel itself") {
		t.Errorf("%+v", fs)
	}
}

func TestSoftLockup(t *testing.T) {
	d := softLockup(DefaultConfig())
	pass := func(f func(i int, c *kernel.CPU)) *Pass {
		p := &Pass{}
		for i := range 80 {
			at := time.Unix(1_800_000_000, 0).Add(time.Duration(i) * 50 * time.Millisecond)
			c := kernel.CPU{ID: 0, Online: true, Curr: 0xffff888000001000, CurrPID: 9, Switches: 100, TimerIRQs: uint64(1000 + 12*i), Preempt: 1}
			f(i, &c)
			p.Beats = append(p.Beats, kernel.Heartbeat{At: at, Mono: int64(time.Minute) + int64(i)*int64(50*time.Millisecond), CPUs: []kernel.CPU{c}})
			p.Now = at
		}
		return p
	}
	for _, tt := range []struct {
		name string
		f    func(int, *kernel.CPU)
		want int
	}{
		{"stuck", func(int, *kernel.CPU) {}, 1},
		{"a program that computes", func(_ int, c *kernel.CPU) { c.Preempt = 0 }, 0},
		{"a program that makes many calls", func(i int, c *kernel.CPU) { c.Preempt = uint32(i % 3) }, 0},
		{"tasks change", func(i int, c *kernel.CPU) { c.Switches += uint64(i / 10) }, 0},
		{"idle", func(_ int, c *kernel.CPU) { c.Idle = true }, 0},
		{"without ticks", func(_ int, c *kernel.CPU) { c.TimerIRQs = 1000 }, 0},
	} {
		if fs := detect(t, d, pass(tt.f)); verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
	}
}

// Code that is not compared is not called sound; what is found beside it is told of.
func TestUncompared(t *testing.T) {
	d := tampering(DefaultConfig())
	p := &Pass{Signs: signs(5, func(int, *kernel.Signs) {}), Uncompared: "the link is down"}
	if fs, err := d.Detect(t.Context(), p); err == nil || len(fs) > 0 {
		t.Errorf("%+v, %v; want that it could not tell", fs, err)
	}
	p.Weakened = []Weakened{{Now: kernel.Guard{Name: "kptr_restrict"}}}
	if fs, err := d.Detect(t.Context(), p); err != nil || len(fs) != 1 {
		t.Errorf("%+v, %v; want a finding", fs, err)
	}
}

func TestChanges(t *testing.T) {
	d := tampering(DefaultConfig())
	change := func(region, symbol string, at kernel.VirtAddr) kernel.Change {
		return kernel.Change{Region: region, Symbol: symbol, Addr: at, Now: make(kernel.HexBytes, 8), Was: kernel.HexBytes("12345678")}
	}
	ofModule := func(module string, c kernel.Change) kernel.Change { c.Module = module; return c }
	for _, tt := range []struct {
		name    string
		stray   bool
		changes []kernel.Change
		want    []int // changes of each finding
	}{
		{"nothing", false, nil, nil},
		{"a stray entry that was there when the agent came", true, nil, []int{0}},
		{"a stray entry, and what was there", true, []kernel.Change{change("rodata", "sys_call_table", 0x1000)}, []int{1}},
		{"two in one table, one elsewhere", false, []kernel.Change{change("rodata", "x_fops", 0x2000), change("rodata", "x_fops", 0x2010), change("text", "f", 0x3000)}, []int{2, 1}},
		{"without a name", false, []kernel.Change{change("idt", "", 0x4000)}, []int{1}},
		{"of modules that have a function of one name", false, []kernel.Change{ofModule("a", change("text", "init", 0x5000)), ofModule("b", change("text", "init", 0x6000))}, []int{1, 1}},
	} {
		fs := detect(t, d, &Pass{Changes: tt.changes, Signs: signs(5, func(_ int, s *kernel.Signs) {
			if tt.stray {
				s.Strays = []kernel.Stray{{Table: "sys_call_table[62]", Addr: 0x1000, To: 0xffffffffc0001000, Owner: "bad"}}
			}
		})})
		var got []int
		keys := make(map[string]bool)
		for _, f := range fs {
			got = append(got, len(f.Changes))
			if m := f.Changes; len(m) > 0 && f.Culprit.Module != m[0].Module {
				t.Errorf("%s: %+v is accused of a change in module %q", tt.name, f.Culprit, m[0].Module)
			}
			keys[f.Key] = true
		}
		if !slices.Equal(got, tt.want) || len(keys) != len(fs) {
			t.Errorf("%s: %+v; want %v", tt.name, fs, tt.want)
		}
	}
}

func TestWeakened(t *testing.T) {
	one := func(name string, oneWay bool) Weakened {
		return Weakened{Was: kernel.Guard{Name: name, Level: 1, Text: "1"}, Now: kernel.Guard{Name: name, Object: "x", Text: "0", OneWay: oneWay}}
	}
	p := &Pass{Signs: []kernel.Signs{{}}, Weakened: []Weakened{one("lockdown", true), one("SELinux", false)}}
	fs := detect(t, tampering(DefaultConfig()), p)
	if len(fs) != 2 || fs[0].Severity != Critical || fs[1].Severity != Warning || fs[0].Key != "guard lockdown" || fs[1].Title != "SELinux was lowered from 1 to 0" {
		t.Errorf("findings = %+v; want a critical one of what nobody may lower, and a warning", fs)
	}
}

// The words of one oops do not stand for the next, whose own are others since 6.11.
func TestLastOops(t *testing.T) {
	log := func(texts ...string) iter.Seq2[kernel.LogRecord, error] {
		return func(yield func(kernel.LogRecord, error) bool) {
			for _, text := range texts {
				if !yield(kernel.LogRecord{Text: text}, nil) {
					return
				}
			}
		}
	}
	first := []string{"BUG: kernel NULL pointer dereference, address: 0000000000000008", "#PF: supervisor write access in kernel mode", "Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI",
		"CPU: 0 UID: 0 PID: 200 Comm: bdfault-oops Tainted: G           OE      6.12", "RIP: 0010:oops_thread+0x9/0x20"}
	second := []string{"Oops: general protection fault, probably for non-canonical address 0x5a5a5a5a5a5a5a5a: 0000 [#2] PREEMPT SMP NOPTI",
		"CPU: 1 UID: 0 PID: 201 Comm: bdfault-uaf Tainted: G      D    OE      6.12"}
	if said, who := lastOops(log(first...)); said != first[0] || who.PID != 200 || *who.CPU != 0 {
		t.Errorf("of the first: %q, %+v", said, who)
	}
	if said, who := lastOops(log(slices.Concat(first, second)...)); said != second[0] || who.PID != 201 || who.Comm != "bdfault-uaf" || *who.CPU != 1 {
		t.Errorf("of the second: %q, %+v", said, who)
	}
	if said, who := lastOops(log("CPU: 0 PID: 1 Comm: swapper")); said != "" || who.CPU != nil {
		t.Errorf("of none: %q, %+v", said, who)
	}
}
