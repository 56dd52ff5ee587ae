package tests

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/healing"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

// TestHealing plays the first healing on each host kernel that is supported and over both paths to memory.
func TestHealing(t *testing.T) {
	for _, tt := range []struct{ kernel, path string }{
		{"6.1", lab.EngineWindow},
		{"6.12", lab.EngineWindow},
		{"6.1", lab.EngineDMA},
	} {
		t.Run(tt.kernel+" over "+tt.path, func(t *testing.T) {
			needLab(t)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			rep, err := healing.Run(ctx, healing.Options{Lab: lab.Config{HostKernel: tt.kernel, Engine: tt.path}, Log: t.Output()})
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range rep.Figures {
				t.Logf("%-70s %-12s %s", f.Name, f.Value, f.From)
			}
		})
	}
}

// TestNothingHealsWithoutWrites is the control of TestHealing: the same story with the agent's writes switched off must fail at the repair.
func TestNothingHealsWithoutWrites(t *testing.T) {
	needLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	_, err := healing.Run(ctx, healing.Options{Lab: lab.Config{NoWrites: true}, Patience: 15 * time.Second, Log: t.Output()})
	if !errors.Is(err, healing.ErrNotHealed) {
		t.Fatalf("healing without writes = %v; want %v", err, healing.ErrNotHealed)
	}
}

// needLab skips a test under -short, which is for machines without QEMU; `make test` never passes it here.
func needLab(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: tests that start virtual machines are left out")
	}
}
