package lab

import (
	"context"
	"os"
	"testing"
	"time"
)

func TestDevFaults(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
	defer cancel()
	l, err := Up(ctx, Config{NoDPU: true, Log: os.Stderr, HostKernel: os.Getenv("K")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 2 {
		t0 := time.Now()
		tr, err := l.Host.Fault(ctx, FaultIRQsOff)
		t.Logf("%v %+v %v", time.Since(t0), tr, err)
		time.Sleep(4 * time.Second)
		out, _ := func() (string, error) { c, _ := l.Host.machine.client(); return c.Human(ctx, "info registers -a") }()
		t.Log(out[:400])
		c, cc := context.WithTimeout(ctx, 3*time.Second)
		s, err := l.Host.ReadFile(c, "/proc/interrupts")
		t.Log(s, err)
		cc()
		b := l.Host.Boots()
		t0 = time.Now()
		t.Log(l.Host.PowerCycle(ctx))
		_, err = l.Host.WaitBoot(ctx, b)
		t.Log(time.Since(t0), err)
	}
	tr, err := l.Host.Fault(ctx, FaultPanic)
	t.Logf("%+v %v %v", tr, err, time.Since(tr.Start))
	b := l.Host.Boots()
	t0 := time.Now()
	t.Log(l.Host.Reset(ctx))
	_, err = l.Host.WaitBoot(ctx, b)
	t.Log(time.Since(t0), err)
	b = l.Host.Boots()
	tr, err = l.Host.Fault(ctx, FaultReboot)
	t.Logf("%+v %v %v", tr, err, time.Since(tr.Start))
	_, err = l.Host.WaitBoot(ctx, b)
	t.Log(time.Since(t0), err)
	m := l.Host.EventMark()
	t.Log(l.Host.Shutdown(ctx))
	e, err := l.Host.WaitEvent(ctx, m, EventOff)
	t.Log(e, err)
	for _, e := range l.Host.Events(0) {
		t.Log(e.At, e.Name, string(e.Data))
	}
}
