package hostmem

import (
	"bytes"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// boundedPage returns a page with an unreadable page on either side: an access that leaves it by one byte faults.
func boundedPage(t *testing.T) ([]byte, words) {
	t.Helper()
	m, err := unix.Mmap(-1, 0, 3*PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(m) })
	for _, page := range [][]byte{m[:PageSize], m[2*PageSize:]} {
		if err := unix.Mprotect(page, unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	p := m[PageSize : 2*PageSize : 2*PageSize]
	return p, newWords(p)
}

func TestWordsStayWithinTheirPage(t *testing.T) {
	p, w := boundedPage(t)
	for i := range p {
		p[i] = byte(i * 7)
	}
	want := bytes.Clone(p)
	for n := range 40 {
		for off := range 24 {
			for _, at := range []int{off, PageSize - off - n} {
				if at+n > PageSize {
					continue
				}
				got := make([]byte, n)
				if bad, faulted := w.trap(func() { w.load(got, at) }); faulted {
					t.Fatalf("load of %d bytes at %d faults at %d", n, at, bad)
				}
				if !bytes.Equal(got, want[at:at+n]) {
					t.Fatalf("load of %d bytes at %d = % x; want % x", n, at, got, want[at:at+n])
				}
				for i := range got {
					got[i] ^= 0xff
				}
				copy(want[at:], got)
				if bad, faulted := w.trap(func() { w.store(got, at) }); faulted {
					t.Fatalf("store of %d bytes at %d faults at %d", n, at, bad)
				}
				if !bytes.Equal(p, want) {
					t.Fatalf("store of %d bytes at %d changed other bytes, or not those", n, at)
				}
			}
		}
	}
}

func TestStoreSize(t *testing.T) {
	for off := range 64 {
		for n := 1; n < 64; n++ {
			size := storeSize(off, n)
			if off%size != 0 || size > n || size > 8 || size&(size-1) != 0 {
				t.Errorf("storeSize(%d, %d) = %d is unaligned or too long", off, n, size)
			}
			if double := size * 2; double <= 8 && off%double == 0 && n >= double {
				t.Errorf("storeSize(%d, %d) = %d; %d would do", off, n, size, double)
			}
		}
	}
	// What fits an aligned word of its own size is one store.
	for _, size := range []int{1, 2, 4, 8} {
		if got := storeSize(16+size, size); got != size {
			t.Errorf("storeSize(%d, %d) = %d; want %d", 16+size, size, got, size)
		}
	}
}

// Stores must not read and rewrite the bytes beside them: those may be changed by the host meanwhile.
func TestStoreLeavesNeighboursAlone(t *testing.T) {
	m, err := unix.Mmap(-1, 0, PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	w := newWords(m)
	const counts = 200_000
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				w.store([]byte{1}, 3)
				w.store([]byte{1, 2, 3, 4}, 8)
				w.store([]byte{1, 2, 3}, 1)
			}
		}
	})
	for range counts {
		atomic.AddUint32(&w.l[1], 1) // bytes 4 to 7
		atomic.AddUint32(&w.l[3], 1) // bytes 12 to 15
	}
	close(stop)
	wg.Wait()
	if w.l[1] != counts || w.l[3] != counts {
		t.Errorf("counters beside stores are %d and %d; want %d", w.l[1], w.l[3], counts)
	}
}

func TestTrapTellsWhere(t *testing.T) {
	p, w := boundedPage(t)
	if err := unix.Mprotect(p, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	if off, faulted := w.trap(func() { w.load(make([]byte, 16), 64) }); !faulted || off != 64 {
		t.Errorf("load at 64 of unreadable memory: fault at %d, %v; want at 64", off, faulted)
	}
	if off, faulted := w.trap(func() { w.store([]byte{1, 2}, 130) }); !faulted || off != 130 {
		t.Errorf("store at 130 of unwritable memory: fault at %d, %v; want at 130", off, faulted)
	}
}

func TestTrapPassesOtherPanicsOn(t *testing.T) {
	_, w := boundedPage(t)
	defer func() {
		if r := recover(); r != "bug" {
			t.Errorf("recovered %v; want the panic that was none of the memory's", r)
		}
	}()
	w.trap(func() { panic("bug") })
}

// A swap against plain loads and stores of another processor: the value returned is one that was there.
func TestSwapTellsTheValueFound(t *testing.T) {
	_, w := boundedPage(t)
	deadline := time.Now().Add(50 * time.Millisecond)
	var wg sync.WaitGroup
	wg.Go(func() {
		for time.Now().Before(deadline) {
			atomic.StoreUint64(&w.q[0], 1)
			atomic.StoreUint64(&w.q[0], 2)
		}
	})
	for time.Now().Before(deadline) {
		if prev := w.swap(0, 1, 1); prev > 2 {
			t.Errorf("swap found %d", prev)
			break
		}
	}
	wg.Wait()
}
