package kernel

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// altered is a memory in which one byte is another.
type altered struct {
	hostmem.Memory
	at hostmem.PhysAddr
}

func (m altered) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.Memory.ReadAt(b, off)
	if i := int64(m.at) - off; i >= 0 && i < int64(n) {
		b[i] ^= 0xff
	}
	return n, err
}

func TestCache(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			first, _ := openRecorded(t, rec)
			var cache Cache
			mem := rec.Frame(frameAlive)
			open := func(mem hostmem.Memory) *Image {
				img, err := Open(t.Context(), mem, Options{Hint: Hint{Note: first.info.Note}, NoteOnly: true, Cache: &cache})
				if err != nil {
					t.Fatal(err)
				}
				return img
			}
			known := func(img *Image) (n int) {
				for _, r := range img.Info().Rungs {
					if strings.Contains(r.Detail, "of this build") {
						n++
					}
				}
				return n
			}
			cold, warm := open(mem), open(mem)
			if known(cold) != 0 || known(warm) != 2 {
				t.Errorf("%d and %d rungs came from the cache; want 0 and 2: %+v", known(cold), known(warm), warm.Info().Rungs)
			}
			for _, name := range []string{"init_task", "runqueues", "linux_banner"} {
				a, aerr := cold.Symbol(name)
				b, berr := warm.Symbol(name)
				if a != b || aerr != nil || berr != nil {
					t.Errorf("%s is at %v (%v), and by the cache at %v (%v)", name, a, aerr, b, berr)
				}
			}
			a, b := 0, 0
			for range cold.View(t.Context()).Tasks() {
				a++
			}
			for _, err := range warm.View(t.Context()).Tasks() {
				if b++; err != nil {
					t.Error(err)
				}
			}
			if a != b || a == 0 {
				t.Errorf("%d tasks, and with the cache %d", a, b)
			}
			// What is not as it was is read as it is. Here that leads nowhere; it must not be taken from the cache.
			pa, _, err := first.space.translate(direct{context.Background(), mem}, first.syms.places.names)
			if err != nil {
				t.Fatal(err)
			}
			img, err := Open(t.Context(), altered{mem, pa}, Options{Hint: Hint{Note: first.info.Note}, NoteOnly: true, Cache: &cache})
			if err == nil && strings.Contains(img.info.Rungs[2].Detail, "of this build") {
				t.Errorf("symbols that are not those of the cache: %+v", img.Info().Rungs)
			}
		})
	})
}

// TestHint attaches to a recording, whose clock stands still, as if its last reading were of different times.
func TestHint(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		img, _ := openRecorded(t, rec)
		b, err := json.Marshal(img.Hint())
		if err != nil {
			t.Fatal(err)
		}
		var now Hint
		if err := json.Unmarshal(b, &now); err != nil || now.Note != img.Info().Note || now.BootID != img.Info().BootID || now.Mono == 0 {
			t.Fatalf("%s: Hint = %s, %v", name, b, err)
		}
		for _, c := range []struct {
			what  string
			hint  func(Hint) Hint
			alive bool
		}{
			{"a clock that went on", func(h Hint) Hint {
				h.Mono -= int64(time.Minute)
				h.At = time.Now().Add(-time.Minute - 3*time.Second)
				return h
			}, true},
			{"a clock that has stood for ten seconds", func(h Hint) Hint {
				h.Mono -= int64(time.Minute)
				h.At = time.Now().Add(-time.Minute - 10*time.Second)
				return h
			}, false},
			{"a clock that has not moved", func(h Hint) Hint { h.At = time.Now().Add(-time.Second); return h }, false},
			{"another boot", func(h Hint) Hint {
				h.BootID, h.Mono, h.At = "other", h.Mono-int64(time.Minute), time.Now().Add(-time.Minute)
				return h
			}, false},
			{"a clock that ran too fast", func(h Hint) Hint {
				h.Mono, h.At = h.Mono-int64(time.Minute), time.Now().Add(-time.Second)
				return h
			}, false},
			{"only the note", func(h Hint) Hint { return Hint{Note: h.Note} }, false},
		} {
			c1 := &candidate{img: img}
			if c1.beat, err = img.View(t.Context()).Heartbeat(); err != nil {
				t.Fatal(err)
			}
			if got := c.hint(now).goesOn(c1, time.Now()); got != c.alive {
				t.Errorf("%s, %s: alive is %v; want %v", name, c.what, got, c.alive)
			}
		}
	})
}
