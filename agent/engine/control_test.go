package engine

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/heal"
)

func TestControl(t *testing.T) {
	for _, tt := range []struct {
		name   string
		rights []string
		writes bool
		want   error
	}{
		{"permitted", []string{heal.PowerCycle}, true, nil},
		{"writes off", []string{heal.PowerCycle}, false, ErrWritesOff},
		{"no agreement", nil, true, access.ErrDenied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(m *made, o *Options) {
				o.Writes = tt.writes
				if tt.rights != nil {
					o.Agreement = agreement(t, guestUUID, tt.rights...)
				}
			}, func(t *testing.T, m *made, w *watched) {
				w.wait(time.Second, "attach", ofType(EventAttached))
				did := false
				err := w.e.Control(t.Context(), "boot device", "Cd once", "alice", func(context.Context) error {
					did = true
					if err := w.e.Control(t.Context(), "boot device", "", "bob", nil); !errors.Is(err, ErrBusy) {
						t.Errorf("Control beside another = %v; want %v", err, ErrBusy)
					}
					return nil
				})
				if !errors.Is(err, tt.want) || did != (tt.want == nil) {
					t.Errorf("Control = %v, done %v; want %v", err, did, tt.want)
				}
				if tt.want != nil {
					return
				}
				failure := errors.New("no such device")
				if err := w.e.Control(t.Context(), "boot device", "Cd once", "alice", func(context.Context) error { return failure }); !errors.Is(err, failure) {
					t.Errorf("Control that fails = %v; want %v", err, failure)
				}
				if err := w.e.MayRead(); err != nil {
					t.Errorf("MayRead = %v", err)
				}
			})
		})
	}
}
