package kernel

import (
	"errors"
	"slices"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

func TestExtent(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		if name != "6.12" {
			return // the others lack pages of the tables that are walked here
		}
		img, _ := openRecorded(t, rec)
		v := img.View(t.Context())
		va, size, err := img.Extent("jiffies")
		if err != nil || size < 8 {
			t.Fatalf("Extent(jiffies) = %v, %#x, %v", va, size, err)
		}
		pa, err := v.Phys(va)
		if err != nil {
			t.Fatal(err)
		}
		got, err := v.InImage(va, size)
		if want := []hostmem.Range{{Start: pa, Size: size}}; err != nil || !slices.Equal(got, want) {
			t.Errorf("InImage(jiffies) = %v, %v; want %v", got, err, want)
		}
		if _, _, err := img.Extent("no_such_symbol"); !errors.Is(err, ErrNotFound) {
			t.Errorf("Extent of nothing: %v; want ErrNotFound", err)
		}
		image, direct := img.Spans()
		for _, s := range []Span{{Virt: direct.Virt, Size: 8}, {Virt: image.Virt, Size: image.Size + 1}, {Virt: image.Virt + VirtAddr(image.Size) - 8, Size: 16}, {Virt: image.Virt + 8, Size: ^uint64(0)}} {
			if r, err := v.InImage(s.Virt, s.Size); !errors.Is(err, ErrNotFound) {
				t.Errorf("InImage(%v, %#x) = %v, %v; want ErrNotFound", s.Virt, s.Size, r, err)
			}
		}
	})
}

// What a process can reach is what its mappings hold, and what it can store to is what of these it may write to.
func TestPresent(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		if name != "6.12" && name != "6.1" {
			return // the others lack the tables
		}
		t.Run(name, func(t *testing.T) {
			img, _ := openRecorded(t, rec)
			m, err := img.View(t.Context()).UserMemory(1)
			if err != nil {
				t.Fatal(err)
			}
			reads, err := m.Present(false)
			if err != nil {
				t.Fatal(err)
			}
			writes, err := m.Present(true)
			if err != nil {
				t.Fatal(err)
			}
			var readable, writable []hostmem.Range
			for x, err := range m.Mappings() {
				if err != nil {
					t.Fatal(err)
				}
				if x.Start >= 1<<63 {
					continue
				}
				for at := x.Start; at < x.End; {
					pa, n, state, err := m.page(at)
					if err != nil {
						t.Fatal(err)
					}
					n = min(n, x.End-at)
					if state == PagePresent {
						readable = append(readable, hostmem.Range{Start: pa, Size: n})
						if x.Perms[1] == 'w' {
							writable = append(writable, hostmem.Range{Start: pa, Size: n})
						}
					}
					at += n
				}
			}
			if want := hostmem.Normalize(readable); !slices.Equal(reads, want) {
				t.Errorf("Present = %v; the mappings have %v", reads, want)
			}
			// Of what may be written, pages that are still a file's or of the page of zeros are not.
			if len(writes) == 0 || !slices.Equal(hostmem.Intersect(writes, writable), writes) {
				t.Errorf("Present for stores = %v; the mappings that may be written have %v", writes, hostmem.Normalize(writable))
			}
			if slices.Equal(reads, writes) {
				t.Error("all that the process reads it may store to, its code, too")
			}
		})
	})
}

// A table that is its own next level is looked at no longer than the bound allows.
func TestPresentCycle(t *testing.T) {
	table := make([]byte, hostmem.PageSize)
	for i := range 512 {
		table[8*i] = 7 // at 0: itself, present, for all
	}
	img := &Image{mem: flat(table), arch: archX8664()}
	m := &UserMemory{v: img.View(t.Context()), space: addressSpace{levels: x8664Levels(5)}}
	if r, err := m.Present(false); !errors.Is(err, ErrNotSupported) {
		t.Errorf("Present = %d ranges, %v; want it refused", len(r), err)
	}
}
