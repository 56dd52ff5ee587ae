package kernel

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

var mutationsFlag = flag.Int("mutations", 0, "how many `times` TestMutations alters the whole memory of each guest")

// The bounds that hold for an attach and everything that can be asked, whatever is in the memory. They are stated for one core
// of a busy test machine; on a whole image of Debian's 6.1 both take a hundredth.
const (
	mutationTime  = time.Minute
	mutationAlloc = 1 << 30 // bytes, all garbage counted
)

// touched is a memory that notes which of its pages are read.
type touched struct {
	hostmem.Memory
	mu    sync.Mutex
	pages map[hostmem.PhysAddr]bool // guarded by mu
}

func (m *touched) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.Memory.ReadAt(b, off)
	m.mu.Lock()
	defer m.mu.Unlock()
	for pa := hostmem.PhysAddr(off) &^ (hostmem.PageSize - 1); pa < hostmem.PhysAddr(off)+hostmem.PhysAddr(n); pa += hostmem.PageSize {
		m.pages[pa] = true
	}
	return n, err
}

// mutated is a memory of which some pages are others.
type mutated struct {
	hostmem.Memory
	pages map[hostmem.PhysAddr][]byte
}

func (m mutated) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.Memory.ReadAt(b, off)
	for pa := hostmem.PhysAddr(off) &^ (hostmem.PageSize - 1); pa < hostmem.PhysAddr(off)+hostmem.PhysAddr(n); pa += hostmem.PageSize {
		p, ok := m.pages[pa]
		if !ok {
			continue
		}
		from, to := max(off, int64(pa)), min(off+int64(n), int64(pa)+hostmem.PageSize)
		copy(b[from-off:to-off], p[from-int64(pa):])
	}
	return n, err
}

// page returns the page at pa to be altered.
func (m mutated) page(t *testing.T, pa hostmem.PhysAddr) []byte {
	if p, ok := m.pages[pa]; ok {
		return p
	}
	p := make([]byte, hostmem.PageSize)
	if _, err := m.Memory.ReadAt(p, int64(pa)); err != nil {
		t.Fatal(err)
	}
	m.pages[pa] = p
	return p
}

// mutations are the ways in which memory is altered.
var mutations = []struct {
	name string
	do   func(r *rand.Rand, page []byte, va VirtAddr, other func() VirtAddr, another []byte)
}{
	{"a bit", func(r *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, _ []byte) {
		page[r.IntN(len(page))] ^= 1 << r.IntN(8)
	}},
	{"a word of noise", func(r *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, _ []byte) {
		putWord(r, page, r.Uint64())
	}},
	{"a small number", func(r *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, _ []byte) {
		putWord(r, page, r.Uint64()>>(32+r.IntN(32)))
	}},
	{"an absurd count", func(r *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, _ []byte) {
		putWord(r, page, []uint64{1<<63 - 1, 1<<64 - 1, 1 << 31, 1<<32 - 1, 1 << 20}[r.IntN(5)])
	}},
	{"a pointer to another object", func(r *rand.Rand, page []byte, _ VirtAddr, other func() VirtAddr, _ []byte) {
		redirect(r, page, other())
	}},
	{"a pointer to itself", func(r *rand.Rand, page []byte, va VirtAddr, _ func() VirtAddr, _ []byte) {
		redirect(r, page, va+VirtAddr(r.IntN(len(page))&^7))
	}},
	{"a pointer into a hole", func(r *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, _ []byte) {
		redirect(r, page, []VirtAddr{0, 8, 0xdead000000000100, 0xffffffffffffff00, 0x7fff12345678, 0xffff888fff000000}[r.IntN(6)])
	}},
	{"the same pointer everywhere", func(r *rand.Rand, page []byte, _ VirtAddr, other func() VirtAddr, _ []byte) {
		to := other()
		for range 32 {
			redirect(r, page, to)
		}
	}},
	{"a page of zeroes", func(_ *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, _ []byte) { clear(page) }},
	{"a page of ones", func(_ *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, _ []byte) {
		for i := range page {
			page[i] = 0xff
		}
	}},
	{"a page of noise", func(r *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, _ []byte) {
		for i := range page {
			page[i] = byte(r.Uint32())
		}
	}},
	{"another page", func(_ *rand.Rand, page []byte, _ VirtAddr, _ func() VirtAddr, another []byte) { copy(page, another) }},
}

func putWord(r *rand.Rand, page []byte, v uint64) {
	at := r.IntN(len(page)/8) * 8
	for i := range 8 {
		page[at+i] = byte(v >> (8 * i))
	}
}

// redirect makes a word that looks like a pointer of the kernel another; without such a word, any.
func redirect(r *rand.Rand, page []byte, to VirtAddr) {
	start := r.IntN(len(page) / 8)
	for i := range len(page) / 8 {
		at := (start + i) % (len(page) / 8) * 8
		if le64(page[at:])>>48 == 0xffff || le64(page[at:])>>52 == 0xff1 {
			for i := range 8 {
				page[at+i] = byte(to >> (8 * i))
			}
			return
		}
	}
	putWord(r, page, uint64(to))
}

// TestMutations alters the whole memory of a frozen guest, in places that an attach or an answer reads, and attaches and asks
// everything each time: it must end within its bounds, without a panic, and what cannot be read must be said so.
func TestMutations(t *testing.T) {
	if *mutationsFlag == 0 {
		t.Skip("a campaign of its own: make fuzz, or -mutations N")
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		fmt.Sscan(s, &seed)
	}
	t.Logf("seed %d; SEED in the environment repeats it", seed)
	someGuests(t, 2, func(t *testing.T, kernel string) {
		g := startListed(t, kernel, guestOptions{mib: 256})
		g.execute("stop")
		seen := &touched{Memory: g.mem, pages: make(map[hostmem.PhysAddr]bool)}
		note := g.attachTo(g.mem, Options{}).Info().Note
		var cache Cache
		img := g.attachTo(seen, Options{Hint: Hint{Note: note}, NoteOnly: true, Cache: &cache})
		attach := sortedPages(seen.pages)
		clear(seen.pages)
		ask(t, t.Context(), img)
		answers := sortedPages(seen.pages)
		direct := img.space.linear[len(img.space.linear)-1]
		r := rand.New(rand.NewPCG(seed, 0))
		outcomes := make(map[string]int)
		var longest time.Duration
		var most uint64
		for n := range *mutationsFlag {
			mem := mutated{g.mem, make(map[hostmem.PhysAddr][]byte)}
			pages, o := answers, Options{Hint: Hint{Note: note}, NoteOnly: true, Cache: &cache}
			if n%8 == 0 { // what the attach reads, all of it: the tables, too
				pages, o.Cache = attach, nil
			}
			pick := func() hostmem.PhysAddr { return pages[r.IntN(len(pages))] }
			other := func() VirtAddr {
				return direct.start + VirtAddr(pick()-direct.pa) + VirtAddr(r.IntN(hostmem.PageSize)&^7)
			}
			var done []string
			for range 1 + r.IntN(4) {
				m := mutations[r.IntN(len(mutations))]
				pa := pick()
				m.do(r, mem.page(t, pa), direct.start+VirtAddr(pa-direct.pa), other, slices.Clone(mem.page(t, pick())))
				done = append(done, fmt.Sprintf("%s at %v", m.name, pa))
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			began := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), mutationTime)
			outcome := func() (outcome string) {
				defer func() {
					if p := recover(); p != nil {
						t.Fatalf("mutation %d (%v): panic: %v", n, done, p)
					}
				}()
				img, err := Open(ctx, mem, o)
				if err != nil {
					return "refused: " + kindOf(err)
				}
				return ask(t, ctx, img)
			}()
			cancel()
			took := time.Since(began)
			runtime.ReadMemStats(&after)
			outcomes[outcome]++
			longest, most = max(longest, took), max(most, after.TotalAlloc-before.TotalAlloc)
			if took >= mutationTime || after.TotalAlloc-before.TotalAlloc > mutationAlloc {
				t.Errorf("mutation %d (%v) took %v and %d MiB: %s", n, done, took, (after.TotalAlloc-before.TotalAlloc)>>20, outcome)
			}
			if outcome == "refused: other" {
				t.Errorf("mutation %d (%v) was refused for no known reason", n, done)
			}
		}
		t.Logf("%d mutations of %d pages: %v; the longest took %v, the most memory %d MiB", *mutationsFlag, len(attach)+len(answers), outcomes, longest, most>>20)
	})
}

func sortedPages(set map[hostmem.PhysAddr]bool) []hostmem.PhysAddr {
	var all []hostmem.PhysAddr
	for pa := range set {
		all = append(all, pa)
	}
	slices.Sort(all)
	return all
}

// ask asks everything, and says how it went.
func ask(t *testing.T, ctx context.Context, img *Image) string {
	v := img.View(ctx)
	outcome := "answered"
	note := func(what string, err error) {
		if err == nil {
			return
		}
		kind := kindOf(err)
		if kind == "other" {
			t.Errorf("%s: %v is of no kind that a caller can tell", what, err)
		}
		outcome = "answered in part"
	}
	_, err := drain(v.Tasks())
	note("tasks", err)
	_, err = drain(v.Log())
	note("log", err)
	_, err = v.Heartbeat()
	note("heartbeat", err)
	_, err = v.Panic()
	note("panic", err)
	for _, l := range slices.Concat(listings, objectListings, liveListings) {
		_, err := l.ask(v)
		note(l.name, err)
	}
	_, err = v.Signs()
	note("signs", err)
	note("golden copies of modules", compareModules(v))
	note("proof", img.Prove(ctx))
	return outcome
}

// kindOf returns what callers can tell of an error.
func kindOf(err error) string {
	var corrupt *CorruptError
	switch {
	case errors.As(err, &corrupt):
		return "corrupt"
	case errors.Is(err, ErrTorn):
		return "torn"
	case errors.Is(err, ErrGone):
		return "gone"
	case errors.Is(err, ErrNotSupported):
		return "not supported"
	case errors.Is(err, ErrNotFound):
		return "not found"
	case errors.Is(err, ErrNotMapped), errors.Is(err, hostmem.ErrNotMapped):
		return "not mapped"
	case errors.Is(err, ErrAmbiguous):
		return "ambiguous"
	case errors.Is(err, context.DeadlineExceeded):
		return "too late"
	}
	return "other"
}
