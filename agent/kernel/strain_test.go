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
