package kernel

import (
	"errors"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// The places are known that strain is read from; their pages need not be recorded. Of most recordings the symbols were pruned.
func TestStrainRecorded(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		img, _ := openRecorded(t, rec)
		for what, f := range map[string]func(*View) error{
			"times of CPUs": func(v *View) error { _, err := v.CPUTimes(); return err },
			"tmpfs":         func(v *View) error { _, err := v.tmpfs(); return err },
			"TCP's memory":  func(v *View) error { _, err := v.tcpMemory(); return err },
			"links": func(v *View) error {
				for _, err := range v.Links() {
					return err
				}
				return nil
			},
			"log": func(v *View) error { _, _, err := v.LogAfter(0, 10); return err },
		} {
			v := img.View(t.Context())
			var fault *hostmem.FaultError
			if err := f(v); err != nil && !errors.As(err, &fault) && (name == "6.1" || !errors.Is(err, ErrNotSupported)) {
				t.Errorf("%s: %s: %v", name, what, err)
			}
		}
	})
}

// Who has seen later records than there are is told what there is.
func TestLogAfter(t *testing.T) {
	held := 0
	recorded(t, func(name string, rec *hostmem.Recording) {
		img, _ := openRecorded(t, rec)
		v := img.View(t.Context())
		defer v.Close()
		first, newest, err := v.LogAfter(0, 2)
		if err != nil || len(first) == 0 {
			return // not recorded
		}
		held++
		if got := first[len(first)-1].Seq; got != newest {
			t.Errorf("%s: the newest record is %d of %d", name, got, newest)
		}
		for _, after := range []uint64{newest, newest + 50} {
			if more, now, err := v.LogAfter(after, 10); err != nil || len(more) > 0 || now != newest {
				t.Errorf("%s: after %d: %d records, the newest %d, %v; want none, %d", name, after, len(more), now, err, newest)
			}
		}
	})
	if held == 0 {
		t.Error("no recording has a log")
	}
}
