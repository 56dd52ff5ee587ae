package heal

import (
	"encoding/json"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

func TestParseValue(t *testing.T) {
	for text, want := range map[string]int64{
		"kernel.pid_max=65536": 65536, "kernel.panic=-1": -1, "kernel.pid_max=0x1000": 4096, "memory.max=512M": 512 << 20, "memory.max=3T": 3 << 40, "x=7K": 7168,
		"kernel.panic_on_oops=max": 1,
	} {
		v, err := ParseValue(text)
		if name, _, _ := strings.Cut(text, "="); err != nil || v.Number != want || v.Name != name {
			t.Errorf("ParseValue(%q) = %+v, %v; want %d", text, v, err, want)
			continue
		}
		if again, err := ParseValue(v.String()); err != nil || again != v {
			t.Errorf("%q comes back as %+v, %v", v, again, err)
		}
	}
	for _, text := range []string{"", "kernel.pid_max", "=3", "a=", "a=M", "a=1.5G", "a=1Q", "a=9999999999999999999", "a=9223372036854775807K", "a=1 2", "a=010x", "a=nomax", "a=0x", "kernel.core_pattern=|/bin/sh"} {
		if v, err := ParseValue(text); !errors.Is(err, ErrValue) {
			t.Errorf("ParseValue(%q) = %+v, %v", text, v, err)
		}
	}
}

func FuzzParseValue(f *testing.F) {
	for _, text := range []string{"kernel.pid_max=65536", "memory.max=512M", "memory.max=max", "a=0x10", "a=-1", "=", "a=9223372036854775807T"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		v, err := ParseValue(text)
		if err != nil {
			if !errors.Is(err, ErrValue) || v != (Value{}) {
				t.Errorf("%q: %+v, %v", text, v, err)
			}
			return
		}
		if again, err := ParseValue(v.String()); err != nil || again != v {
			t.Errorf("%q comes back as %+v, %v", text, again, err)
		}
		for _, a := range Actions() {
			if err := a.Check(&v); err == nil && (v.Number < a.Settings[0].Min && len(a.Settings) == 1 || len(a.Settings) == 0) {
				t.Errorf("%s takes %s", a.ID, v)
			}
		}
	})
}

// What no program may be named by, and what every setting must be.
func TestSettings(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range Actions() {
		if (a.Plan == nil) != (len(a.Settings) > 0) || (a.Set != nil) != (len(a.Settings) > 0) {
			t.Errorf("%s: plans without a value %v, with one %v, and has %d settings", a.ID, a.Plan != nil, a.Set != nil, len(a.Settings))
		}
		if _, ok := Find(a.Undo); a.Undo != "" && !ok {
			t.Errorf("%s is undone by %q", a.ID, a.Undo)
		}
		for _, s := range a.Settings {
			if s.Min > s.Max || seen[s.Name] || strings.Contains(s.Name, "modprobe") || strings.Contains(s.Name, "core_pattern") {
				t.Errorf("%s: %s", a.ID, s)
			}
			seen[s.Name] = true
		}
	}
	if !seen["kernel.panic"] {
		t.Error("nothing can be set")
	}
	for _, s := range sysctls {
		if s.why == "" || s.size != 1 && s.size != 4 && s.size != 8 || s.size == 4 && (s.max > math.MaxUint32 || s.min < math.MinInt32) || s.unsigned && s.min < 0 || s.size == 1 && s.max > 255 {
			t.Errorf("%+v", s)
		}
	}
}

func TestCheckValue(t *testing.T) {
	kill, _ := Find(KillProcess)
	set, _ := Find(SetSysctl)
	for _, tt := range []struct {
		a    Action
		v    *Value
		want string // part of the error; empty for none
	}{
		{kill, nil, ""},
		{set, &Value{"kernel.panic", 10}, ""},
		{set, &Value{"kernel.panic", -1}, ""},
		{set, &Value{"kernel.panic", -2}, "cannot be -2; give kernel.panic=-1..86400 s"},
		{set, &Value{"kernel.panic_on_oops", 2}, "give kernel.panic_on_oops=0..1"},
		{set, nil, "give one of kernel.pid_max, "},
		{set, &Value{"kernel.core_pattern", 1}, `there is no "kernel.core_pattern"; give one of`},
		{kill, &Value{"kernel.panic", 1}, "kernel.panic is what set-sysctl sets"},
		{kill, &Value{"x", 1}, "leave that out"},
	} {
		err := tt.a.Check(tt.v)
		if (err == nil) != (tt.want == "") || err != nil && (!errors.Is(err, ErrValue) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("Check(%s, %v) = %v; want %q", tt.a.ID, tt.v, err, tt.want)
		}
		if tt.want != "" {
			if p, err := tt.a.Prepare(t.Context(), nil, detect.Finding{}, tt.v); !errors.Is(err, ErrValue) || len(p.Steps) > 0 {
				t.Errorf("Prepare(%s, %v) = %v, %v", tt.a.ID, tt.v, p.Title, err)
			}
		}
	}
}

// sysctlHost is a host with some settings, each with what its kernel says of it.
func sysctlHost(t *testing.T) *fakeHost {
	h := newFakeHost(t)
	at := func(off int) kernel.VirtAddr { return kernel.VirtAddr(direct + 0x170000 + uint64(off)) }
	h.symbols["pid_max"], h.symbols["panic_on_oops"], h.symbols["max_threads"], h.symbols["files_stat"] = at(0), at(4), at(8), at(16)
	h.symbols["init_net"], h.symbols["sysctl_overcommit_memory"], h.symbols["panic_timeout"] = at(0x100), at(12), at(0x60)
	h.symbols["sysctl_hung_task_timeout_secs"] = at(0x68)
	h.fields["files_stat_struct.max_files"] = kernel.Field{Offset: 16, Size: 8}
	h.fields["net.ipv4.sysctl_tcp_syncookies"] = kernel.Field{Offset: 0x21, Size: 1}
	h.put32(0x170000, 32768)
	h.put32(0x170008, 4000)
	h.put64(0x170020, math.MaxInt64) // file-max
	h.write(0x170121, []byte{1})
	h.put32(0x170040, 1024)    // the least for pid_max on this host
	h.put32(0x170044, 4194304) // the most
	h.put32(0x170060, 0xffffffff)
	h.sysctls = []kernel.Sysctl{
		{Name: "kernel.pid_max", Addr: at(0), Size: 4, Handler: "proc_dointvec_minmax", Low: at(0x40), High: at(0x44)},
		{Name: "kernel.panic_on_oops", Addr: at(4), Size: 4, Handler: "proc_dointvec"},
		{Name: "kernel.threads-max", Size: 4, Handler: "sysctl_max_threads"},
		{Name: "fs.file-max", Addr: at(0x20), Size: 8, Handler: "proc_doulongvec_minmax"},
		{Name: "net.ipv4.tcp_syncookies", Addr: at(0x121), Size: 1, Handler: "proc_dou8vec_minmax"},
		{Name: "vm.overcommit_memory", Addr: at(12), Size: 4, Handler: "overcommit_policy_handler"},
		{Name: "kernel.panic", Addr: at(0x60), Size: 4, Handler: "proc_dointvec"},
		{Name: "kernel.hung_task_timeout_secs", Addr: at(0x68), Size: 8, Handler: "proc_dohung_task_timeout_secs"},
	}
	return h
}

func TestSetSysctl(t *testing.T) {
	h := sysctlHost(t)
	executor := func() *Executor {
		o := options(t, h, &memJournal{})
		o.Grant = grant(t, permit(SetSysctl))
		return NewExecutor(o)
	}
	for _, x := range []struct {
		v    Value
		at   hostmem.PhysAddr
		size int
	}{
		{Value{"kernel.pid_max", 65536}, 0x170000, 4}, {Value{"kernel.panic_on_oops", 1}, 0x170004, 4}, {Value{"kernel.threads-max", 9000}, 0x170008, 4},
		{Value{"fs.file-max", 1 << 20}, 0x170020, 8}, {Value{"net.ipv4.tcp_syncookies", 2}, 0x170121, 1}, {Value{"vm.overcommit_memory", 1}, 0x17000c, 4}, {Value{"kernel.panic", 30}, 0x170060, 4},
	} {
		before := h.snapshot()
		p, err := planSysctl(h, detect.Finding{ID: "exhaustion-1"}, x.v)
		if err != nil {
			t.Errorf("%s: %v", x.v, err)
			continue
		}
		p.ID = "plan-1"
		out, err := executor().Apply(t.Context(), p, "test")
		if err != nil {
			t.Fatalf("%s: %v", x.v, err)
		}
		if got := h.get(x.at, x.size); got != uint64(x.v.Number) {
			t.Errorf("%s: it is %d", x.v, got)
		}
		for _, at := range h.diff(before) {
			if at < x.at || at >= x.at+hostmem.PhysAddr(x.size) {
				t.Errorf("%s: %v was written, too", x.v, at)
			}
		}
		if _, err := planSysctl(h, detect.Finding{}, x.v); !errors.Is(err, ErrValue) || !strings.Contains(err.Error(), "already") {
			t.Errorf("%s once more: %v", x.v, err)
		}
		back, err := TakeBack(out)
		if err != nil {
			t.Fatalf("%s: %v", x.v, err)
		}
		if back.Digest() == p.Digest() {
			t.Errorf("%s: to take it back is the same plan", x.v)
		}
		back.ID = "plan-2"
		done, err := executor().ApplyNext(t.Context(), back, "test")
		if err != nil || h.diff(before) != nil {
			t.Errorf("%s taken back: %v; differs at %v", x.v, err, h.diff(before))
		}
		if _, err := TakeBack(done); err == nil {
			t.Errorf("%s is taken back twice", x.v)
		}
	}
	for _, v := range []Value{{"kernel.pid_max", 1000}, {"kernel.core_pattern", 0}} { // below what this kernel's own table has; none of ours
		if p, err := planSysctl(h, detect.Finding{}, v); !errors.Is(err, ErrValue) {
			t.Errorf("%s: %s, %v", v, p.Title, err)
		}
	}
	if _, err := planSysctl(h, detect.Finding{}, Value{"kernel.pid_max", 1000}); !strings.Contains(err.Error(), "takes 1024 to 4194304") {
		t.Errorf("the host's own bounds are not told: %v", err)
	}
}

// A kernel in which a setting is another thing than here is known of is left alone.
func TestSetSysctlElsewhere(t *testing.T) {
	for name, tt := range map[string]struct {
		v      Value
		change func(*fakeHost)
	}{
		"another variable":   {Value{"kernel.pid_max", 65536}, func(h *fakeHost) { h.sysctls[0].Addr += 4 }},
		"another size":       {Value{"kernel.pid_max", 65536}, func(h *fakeHost) { h.sysctls[0].Size = 8 }},
		"another handler":    {Value{"kernel.pid_max", 65536}, func(h *fakeHost) { h.sysctls[0].Handler = "sched_rt_handler" }},
		"no symbol":          {Value{"kernel.pid_max", 65536}, func(h *fakeHost) { delete(h.symbols, "pid_max") }},
		"no such setting":    {Value{"kernel.panic_on_warn", 1}, func(h *fakeHost) {}},
		"another type":       {Value{"net.ipv4.tcp_syncookies", 2}, func(h *fakeHost) { h.fields["net.ipv4.sysctl_tcp_syncookies"] = kernel.Field{Offset: 0x21, Size: 4} }},
		"strict accounting":  {Value{"vm.overcommit_memory", 0}, func(h *fakeHost) { h.put32(0x17000c, 2) }},
		"nobody looks there": {Value{"kernel.hung_task_timeout_secs", 60}, func(h *fakeHost) {}},
	} {
		h := sysctlHost(t)
		tt.change(h)
		if p, err := planSysctl(h, detect.Finding{}, tt.v); err == nil {
			t.Errorf("%s: %s", name, p.Title)
		}
	}
}

// What the agreement does not give is not done, whatever the plan says, except that it is taken back.
func TestValueAgreed(t *testing.T) {
	h := sysctlHost(t)
	j := &memJournal{}
	o := options(t, h, j)
	o.Grant = grant(t, func(a *access.Agreement) {
		a.Rights.Actions = []string{SetSysctl}
		a.Rights.Values = []access.ValueRange{{Action: SetSysctl, Name: "kernel.pid_max", Min: 40000, Max: 70000}}
	})
	before := h.snapshot()
	for _, v := range []Value{{"kernel.pid_max", 80000}, {"kernel.panic_on_oops", 1}} {
		p, err := planSysctl(h, detect.Finding{ID: "x-1"}, v)
		if err != nil {
			t.Fatal(err)
		}
		p.ID = "plan-1"
		if _, err := NewExecutor(o).Apply(t.Context(), p, "test"); !errors.Is(err, access.ErrDenied) || h.diff(before) != nil {
			t.Errorf("%s: %v; changed %v", v, err, h.diff(before))
		}
	}
	for _, v := range []*Value{nil, {"kernel.pid_max", 3}, {"kernel.modprobe", 50000}} { // a plan that says something else of itself, or nothing
		p, err := planSysctl(h, detect.Finding{ID: "x-1"}, Value{"kernel.pid_max", 50000})
		if err != nil {
			t.Fatal(err)
		}
		p.ID, p.Value = "plan-1", v
		if _, err := NewExecutor(o).Apply(t.Context(), p, "test"); !errors.Is(err, ErrValue) || h.diff(before) != nil {
			t.Errorf("with %v: %v; changed %v", v, err, h.diff(before))
		}
	}
	p, err := planSysctl(h, detect.Finding{ID: "x-1"}, Value{"kernel.pid_max", 50000})
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-2"
	out, err := NewExecutor(o).Apply(t.Context(), p, "test")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(out); err != nil || !strings.Contains(string(b), `"value":{"name":"kernel.pid_max","number":50000}`) {
		t.Errorf("the journal does not have the value: %s, %v", b, err)
	}
	back, err := TakeBack(out) // to 32768, which is not given
	if err != nil {
		t.Fatal(err)
	}
	back.ID = "plan-3"
	if _, err := NewExecutor(o).ApplyNext(t.Context(), back, "test"); err != nil || h.diff(before) != nil {
		t.Errorf("taken back: %v", err)
	}
	if !slices.ContainsFunc(back.Steps, func(s Step) bool { return s.Object == "kernel.pid_max" }) {
		t.Errorf("%+v", back.Steps)
	}
}
