package kernel

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Where memory is mapped, a panic is seen by the call that would sleep; where it is not, that is said.
func TestSleepUnlessPanicked(t *testing.T) {
	const nap = 20 * time.Millisecond
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			mem := mappedCopy(t, rec.Frame(frameAlive))
			note, err := strconv.ParseUint(rec.Labels()["note"], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			img, err := Open(context.Background(), mem, Options{Hint: Hint{Note: hostmem.PhysAddr(note)}, NoteOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			for time.Since(began) < nap { // a signal of the runtime's may end a sleep
				if panicked, err := img.SleepUnlessPanicked(nap); panicked || err != nil {
					t.Fatalf("SleepUnlessPanicked() = %v, %v over a kernel that lives", panicked, err)
				}
			}
			v := img.View(t.Context())
			defer v.Close()
			at, err := img.Symbol("panic_cpu")
			if err != nil {
				t.Fatal(err)
			}
			pa, err := v.Phys(at)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := mem.WriteAt([]byte{1, 0, 0, 0}, int64(pa)); err != nil {
				t.Fatal(err)
			}
			if panicked, err := img.SleepUnlessPanicked(time.Minute); !panicked || err != nil {
				t.Errorf("SleepUnlessPanicked() = %v, %v when CPU 1 has panicked; want true at once", panicked, err)
			}

			unmapped, _ := openRecorded(t, rec)
			if _, err := unmapped.SleepUnlessPanicked(time.Minute); !errors.Is(err, ErrNotSupported) {
				t.Errorf("SleepUnlessPanicked() over a recording = %v; want %v", err, ErrNotSupported)
			}
		})
	})
}

// mappedCopy is a RAM file with all that a recording has; what it has not is zero.
func mappedCopy(t *testing.T, from hostmem.Memory) *hostmem.RAMFile {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ram")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var layout []hostmem.Extent // each address is its own offset: the file is sparse
	for _, r := range from.Map() {
		layout = append(layout, hostmem.Extent{Range: r, Offset: int64(r.Start)})
		if err := f.Truncate(int64(r.End())); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range hostmem.ResidentRanges(from) {
		b := make([]byte, r.Size)
		if _, err := from.ReadAt(b, int64(r.Start)); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, int64(r.Start)); err != nil {
			t.Fatal(err)
		}
	}
	mem, err := hostmem.OpenRAMFile(path, layout, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return mem
}
