package lab

import (
	"context"
	"os"
	"testing"
	"time"
)

func TestDevFull(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
	defer cancel()
	l, err := Up(ctx, Config{Log: os.Stderr, HostKernel: os.Getenv("K")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Log(l.DPU.URL, l.DPU.User, l.DPU.Password, l.DPU.InitialPassword, l.DPU.BootTook)
	for _, li := range l.DPU.Console().Tail(100) {
		t.Log(li)
	}
	c, err := l.DPU.Redfish()
	t.Log(err)
	s, err := c.System(ctx)
	t.Logf("%+v %v", s, err)
	t0 := time.Now()
	t.Log(l.DPU.Restart(ctx), time.Since(t0))
	for _, li := range l.DPU.Console().Tail(25) {
		t.Log(li)
	}
	t.Log(l.DPU.WirePort().Counters())
	s, err = c.System(ctx)
	t.Logf("%+v %v", s, err)
}
