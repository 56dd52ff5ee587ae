package lab

import (
	"context"
	"os"
	"testing"
	"time"
)

func TestHostBoots(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	l, err := Up(ctx, Config{NoDPU: true, Log: os.Stderr, HostKernel: os.Getenv("K"), HostCPU: os.Getenv("CPU")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Logf("%+v", l.Host.Ready())
	z, m, err := l.Host.clock(ctx)
	t.Log(z, m, err)
	ps, err := l.Host.PS(ctx)
	for _, p := range ps {
		if !p.Kernel {
			t.Log(p.Stat, p.UID, err)
		}
	}
	for i, c := range []string{"ls -la / /bin | head -20; cat /proc/interrupts", "dmesg | tail -3", "free; uptime"} {
		t0 := time.Now()
		r, err := l.Host.Exec(ctx, c)
		t.Logf("%d %v %v %+v", i, time.Since(t0), err, r.Stdout)
	}
	t0 := time.Now()
	s, err := l.Host.ReadFile(ctx, "/proc/kallsyms")
	t.Log(len(s), err, time.Since(t0))
	tr, err := l.Host.Fault(ctx, FaultRunaway)
	t.Logf("%+v %v", tr, err)
	t.Log(l.Host.TraceFunctions(ctx, "do_send_sig_info", "__x64_sys_kill", "nonsense", "do_exit"))
	mark := l.Host.EventMark()
	l.Host.Do(ctx, "kill", map[string]int{"pid": tr.PID, "signal": 9}, nil)
	x, err := l.Host.WaitExit(ctx, mark, tr.PID)
	t.Log(x, err)
	fc, err := l.Host.Traced(ctx)
	t.Logf("%+v %v", fc, err)
	tr, err = l.Host.Fault(ctx, FaultIRQsOff)
	t.Logf("%+v %v", tr, err)
	tr, err = l.Host.Fault(ctx, FaultPanic)
	t.Logf("%+v %v", tr, err)
	t.Log(time.Since(tr.Start))
	for _, li := range l.Host.Console().Tail(50) {
		t.Log(li)
	}
}
