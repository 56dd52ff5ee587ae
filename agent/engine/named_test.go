package engine

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const recordedUUID = "6f1e5c1e-0001-4a6b-9d7a-0123456789ab"

// recordedHost is the memory of a real guest, recorded; a test can show another frame of it, and change words.
type recordedHost struct {
	*hostmem.Recording
	now   hostmem.Memory
	words map[hostmem.PhysAddr]uint64
}

func (m *recordedHost) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.now.ReadAt(b, off)
	for at, v := range m.words {
		if d := int64(at) - off; d >= 0 && d+8 <= int64(len(b)) {
			binary.LittleEndian.PutUint64(b[d:], v)
		}
	}
	return n, err
}

// openRecordedHost attaches to a recording.
func openRecordedHost(t *testing.T, name string) (*recordedHost, *kernel.Image) {
	t.Helper()
	mem, err := hostmem.OpenImage("../kernel/testdata/" + name + ".hostmem")
	if err != nil {
		t.Fatal(err)
	}
	rec := mem.(*hostmem.Recording)
	note, err := strconv.ParseUint(rec.Labels()["note"], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	m := &recordedHost{rec, rec.Frame(0), make(map[hostmem.PhysAddr]uint64)}
	img, err := kernel.Open(t.Context(), m, kernel.Options{Hint: kernel.Hint{Note: hostmem.PhysAddr(note)}, NoteOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	return m, img
}

// watching returns an engine under an agreement with these entries of rights.memory, and what attaches it to a kernel.
func watching(t *testing.T, entries ...access.Memory) (*Engine, func(*recordedHost, *kernel.Image)) {
	t.Helper()
	owner, monitor := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)), ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32))
	a := &access.Agreement{
		Version: access.Version, ID: "names", Host: access.Host{UUID: recordedUUID, Name: "guest"},
		Owner:    access.Party{Name: "owner", Key: access.Key(owner.Public().(ed25519.PublicKey))},
		Monitors: []access.Party{{Name: "monitor", Key: access.Key(monitor.Public().(ed25519.PublicKey))}},
		Rights:   access.Rights{Read: true, Write: true, Memory: entries}, Protected: []access.Protected{{FirstUID: 1001, LastUID: 1001}},
		ValidFrom: time.Now().Add(-time.Hour), ValidUntil: time.Now().Add(24 * time.Hour),
	}
	for _, k := range []ed25519.PrivateKey{owner, monitor} {
		if err := a.Sign(k); err != nil {
			t.Fatal(err)
		}
	}
	e := New(Options{Agreement: access.Hold(a), HostUUID: recordedUUID, Writes: true})
	return e, func(m *recordedHost, img *kernel.Image) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.mem, e.target = m, nil
		if img != nil {
			e.target = realTarget{img}
		}
	}
}

// where returns where a symbol of a kernel is, and its size.
func where(t *testing.T, img *kernel.Image, name string) (hostmem.PhysAddr, uint64) {
	t.Helper()
	va, size, err := img.Extent(name)
	if err != nil {
		t.Fatal(err)
	}
	pa, err := img.View(t.Context()).Phys(va)
	if err != nil || size == 0 {
		t.Fatalf("%s is at %v, %d bytes: %v", name, pa, size, err)
	}
	return pa, size
}

// forget has the answers that are kept for some milliseconds be too old.
func forget(e *Engine) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.named != nil {
		e.named.mu.Lock()
		defer e.named.mu.Unlock()
		for k, a := range e.named.kept {
			a.at = a.at.Add(-time.Minute)
			e.named.kept[k] = a
		}
	}
}

func TestNamedMemory(t *testing.T) {
	e, attach := watching(t, access.Memory{Symbol: "jiffies", Read: true, Write: true}, access.Memory{Symbol: "linux_banner", Size: 16, Read: true},
		access.Memory{KernelText: true, Read: true}, access.Memory{Symbol: "no_such_symbol", Atomic: true, Read: true})
	check := func(start hostmem.PhysAddr, size uint64, write bool, want string) {
		t.Helper()
		forget(e)
		err := e.MayLease(hostmem.Range{Start: start, Size: size}, write)
		if want == "" && err != nil {
			t.Errorf("%#x bytes at %v: %v; want them permitted", size, start, err)
		}
		if want != "" && (!errors.Is(err, access.ErrDenied) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%#x bytes at %v: %v; want them denied with %q", size, start, err, want)
		}
	}
	check(0x1000, 8, false, "no kernel of the host is attached")

	mem, img := openRecordedHost(t, "6.12")
	attach(mem, img)
	jiffies, size := where(t, img, "jiffies")
	check(jiffies, size, true, "")
	check(jiffies, size+1, true, `symbol "jiffies": that is `)
	check(jiffies-1, 8, true, `symbol "jiffies": that is `)
	check(jiffies+hostmem.PhysAddr(size), 1, false, "that is")
	check(jiffies, ^uint64(0), false, "that is")
	banner, _ := where(t, img, "linux_banner")
	check(banner, 16, false, "")
	check(banner, 17, false, `0x10 bytes of symbol "linux_banner"`)
	check(banner, 16, true, "not permitted")
	text, etext := kernelTextOf(t, img)
	check(text, uint64(etext-text), false, "")
	check(text, uint64(etext-text)+1, false, "the kernel's text: that is")
	check(text-1, 2, false, "the kernel's text: that is")
	check(text, 8, true, "not permitted")
	if err := e.Grant().PermitMemory(uint64(jiffies), 8, true, false, true); !errors.Is(err, access.ErrDenied) || !strings.Contains(err.Error(), `"no_such_symbol": not found`) {
		t.Errorf("a symbol that is not there: %v", err)
	}

	// The next boot, before the engine has seen that the kernel is gone, and what it attaches to then: another kernel, elsewhere.
	mem.now = mem.Frame(3)
	check(jiffies, 8, false, "kernel is no longer in memory")
	other, next := openRecordedHost(t, "6.12-generic")
	attach(other, next)
	check(banner, 16, false, "linux_banner")
	moved, _ := where(t, next, "linux_banner")
	if moved == banner {
		t.Fatal("both kernels have it at the same place")
	}
	check(moved, 16, false, "")
	attach(other, nil)
	check(moved, 16, false, "no kernel of the host is attached")
}

func kernelTextOf(t *testing.T, img *kernel.Image) (from, to hostmem.PhysAddr) {
	t.Helper()
	for name, at := range map[string]*hostmem.PhysAddr{"_stext": &from, "_etext": &to} {
		va, err := img.Symbol(name)
		if err != nil {
			t.Fatal(err)
		}
		if *at, err = img.View(t.Context()).Phys(va); err != nil {
			t.Fatal(err)
		}
	}
	return from, to
}

// stale is a resolver as it must not be: it goes by what it found first.
type stale struct {
	*named
	first map[string]error
}

func (s stale) Inside(m access.Memory, start, size uint64, write bool, permit func(int, bool, uint32, string) error) error {
	key := fmt.Sprint(m.Names(), start, size, write)
	if _, ok := s.first[key]; !ok {
		s.first[key] = s.named.Inside(m, start, size, write, permit)
	}
	return s.first[key]
}

// A name that the host moves to other memory is given no longer, neither where it was nor where it is now, until it is back.
func TestNamedMemoryMoves(t *testing.T) {
	for _, planted := range []bool{false, true} { // a resolver as it must not be, which the same questions have to find out
		t.Run(fmt.Sprintf("stale %v", planted), func(t *testing.T) {
			e, attach := watching(t, access.Memory{Symbol: "jiffies", Read: true})
			mem, img := openRecordedHost(t, "6.12")
			attach(mem, img)
			at, _ := where(t, img, "jiffies")
			first := make(map[string]error)
			permit := func(at hostmem.PhysAddr) error {
				forget(e)
				g := e.Grant()
				if planted {
					g = g.Resolving(stale{e.named, first})
				}
				return g.PermitMemory(uint64(at), 8, true, false, false)
			}
			if err := permit(at); err != nil {
				t.Fatalf("before it moves: %v", err)
			}
			entry, value := tableEntry(t, mem, img, rootOf(t, img), addressOf(t, img, "jiffies"))
			mem.words[entry] = value + 2<<20 // which is present, and memory of the image, too
			was := permit(at)
			if given := was == nil; given != planted {
				t.Errorf("where it was: %v; want it given only by the planted resolver", was)
			}
			if !planted && !strings.Contains(was.Error(), "none of it is in memory now") {
				t.Errorf("where it was: %v", was)
			}
			if err := permit(at + 2<<20); err == nil {
				t.Error("where the host has put it is given")
			}
			delete(mem.words, entry)
			if err := permit(at); err != nil {
				t.Errorf("after it is back: %v", err)
			}
		})
	}
}

func addressOf(t *testing.T, img *kernel.Image, name string) kernel.VirtAddr {
	t.Helper()
	va, err := img.Symbol(name)
	if err != nil {
		t.Fatal(err)
	}
	return va
}

// rootOf returns where the kernel's own page tables begin.
func rootOf(t *testing.T, img *kernel.Image) hostmem.PhysAddr {
	t.Helper()
	at, err := img.View(t.Context()).Phys(addressOf(t, img, "init_top_pgt"))
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// tableEntry finds the entry of page tables that maps the page at va.
func tableEntry(t *testing.T, mem hostmem.Memory, img *kernel.Image, table hostmem.PhysAddr, va kernel.VirtAddr) (hostmem.PhysAddr, uint64) {
	t.Helper()
	for shift := 12 + 9*(img.Info().Levels-1); ; shift -= 9 {
		at := table + hostmem.PhysAddr(8*(uint64(va)>>shift&511))
		var b [8]byte
		if _, err := mem.ReadAt(b[:], int64(at)); err != nil {
			t.Fatal(err)
		}
		e := binary.LittleEndian.Uint64(b[:])
		if e&1 == 0 || shift == 12 || shift < 39 && e&(1<<7) != 0 {
			return at, e
		}
		table = hostmem.PhysAddr(e & 0x000ffffffffff000)
	}
}

func TestNamedAll(t *testing.T) {
	e, attach := watching(t, access.Memory{All: true, Read: true})
	mem, img := openRecordedHost(t, "6.12")
	attach(mem, img)
	ram := hostmem.Intersect(mem.Map(), img.RAM())
	end := uint64(ram[len(ram)-1].End())
	if err := e.MayLease(hostmem.Range{Size: end}, false); err != nil {
		t.Errorf("all RAM: %v", err)
	}
	for _, r := range []hostmem.Range{{Size: end + 1}, {Start: hostmem.PhysAddr(end), Size: 8}, {Start: 8, Size: ^uint64(0)}} {
		if err := e.MayLease(r, false); !errors.Is(err, access.ErrDenied) {
			t.Errorf("%v: %v; want it denied", r, err)
		}
	}
	if err := e.MayLease(hostmem.Range{Size: 8}, true); !errors.Is(err, access.ErrDenied) {
		t.Errorf("a store: %v; want it denied", err)
	}
}

func TestNamedProcesses(t *testing.T) {
	_, img := openRecordedHost(t, "6.12")
	v := img.View(t.Context())
	anything := func(int, bool, uint32, string) error { return nil }
	reads, err := processes(v, 0, "init", false, anything)
	if err != nil || len(reads) == 0 {
		t.Fatalf("init's memory: %v, %v", reads, err)
	}
	writes, err := processes(v, 0, "init", true, anything)
	if err != nil || len(writes) == 0 || !slices.Equal(hostmem.Intersect(reads, writes), writes) || slices.Equal(reads, writes) {
		t.Errorf("init may store to %v, and read %v: %v", writes, reads, err)
	}
	for _, who := range []struct {
		uid  uint32
		comm string
	}{{1000, "init"}, {0, "ini"}, {0, "kthreadd"}} {
		if r, err := processes(v, who.uid, who.comm, false, anything); err != nil || len(r) != 0 {
			t.Errorf("processes %+v have %v, %v", who, r, err)
		}
	}
	// The agreement's own rule: init is never touched, whatever the entry says.
	e, _ := watching(t)
	if r, err := processes(v, 0, "init", false, e.Grant().PermitTask); err != nil || len(r) != 0 {
		t.Errorf("init's memory is given: %v, %v", r, err)
	}
}

// What a hostile host puts into page tables, or which memory it says is whose, gives nothing that the agreement keeps back.
func TestNamedProcessesOfAHostileHost(t *testing.T) {
	mem, img := openRecordedHost(t, "6.12")
	uid := uint32(0)
	name := access.Memory{Process: &access.Process{UID: &uid, Comm: "init"}}
	look := func(write bool, keep string) ([]hostmem.Range, error) {
		t.Helper()
		return (&named{img: img}).look(t.Context(), name, write, func(_ int, _ bool, _ uint32, comm string) error {
			if comm == keep {
				return access.ErrDenied
			}
			return nil
		})
	}
	before, err := look(true, "")
	if err != nil || len(before) == 0 {
		t.Fatalf("init stores to %v, %v", before, err)
	}
	v := img.View(t.Context())
	word := func(at kernel.VirtAddr, typ, field string) (hostmem.PhysAddr, uint64) {
		t.Helper()
		f, err := img.Field(typ, field)
		if err != nil {
			t.Fatal(err)
		}
		pa, err := v.Phys(at + kernel.VirtAddr(f.Offset))
		if err != nil {
			t.Fatal(err)
		}
		x, err := v.Uint64(at + kernel.VirtAddr(f.Offset))
		if err != nil {
			t.Fatal(err)
		}
		return pa, x
	}
	tasks := make(map[string]kernel.Task)
	for task, err := range v.Tasks() {
		if err != nil {
			t.Fatal(err)
		}
		tasks[task.Comm] = task
	}
	_, mm := word(tasks["init"].Addr, "task_struct", "mm")
	_, pgd := word(kernel.VirtAddr(mm), "mm_struct", "pgd")
	root, err := v.Phys(kernel.VirtAddr(pgd))
	if err != nil {
		t.Fatal(err)
	}
	m, err := v.UserMemory(1)
	if err != nil {
		t.Fatal(err)
	}
	const address = 0x000ffffffffff000
	page := func(at uint64) hostmem.Range {
		return hostmem.Range{Start: hostmem.PhysAddr(at), Size: hostmem.PageSize}
	}
	var entry hostmem.PhysAddr // of a page that it may store to
	var value uint64
	for x, err := range m.Mappings() {
		if err != nil {
			t.Fatal(err)
		}
		for va := x.Start; x.Perms[1] == 'w' && va < x.End && entry == 0; va += hostmem.PageSize {
			if at, e := tableEntry(t, mem, img, root, kernel.VirtAddr(va)); len(hostmem.Intersect(before, []hostmem.Range{page(e & address)})) > 0 {
				entry, value = at, e
			}
		}
	}
	if entry == 0 {
		t.Fatalf("no page of init is found in what it stores to: %v", before)
	}
	image, _ := img.Spans()
	free := uint64(0xa000000) // RAM that nothing of what is asked about is in
	for _, c := range []struct {
		what  string
		at    uint64
		given bool
	}{{"the kernel's code", uint64(image.Phys), false}, {"a device", 0xfee00000, false}, {"behind all RAM", 1 << 51, false}, {"other RAM", free, true}} {
		mem.words[entry] = value&^address | c.at
		got, err := look(true, "")
		if err != nil || (len(hostmem.Intersect(got, []hostmem.Range{page(c.at)})) > 0) != c.given {
			t.Errorf("a page of init is said to be %s: it stores to %v, %v", c.what, got, err)
		}
	}
	delete(mem.words, entry)

	// A process that is protected and has the same memory: what it stores to is kept back.
	at, _ := word(tasks["g-sleep"].Addr, "task_struct", "mm")
	mem.words[at] = mm
	if got, err := look(true, "g-sleep"); err != nil || len(got) != 0 {
		t.Errorf("what a protected process stores to is given: %v, %v", got, err)
	}
	if got, err := look(false, "g-sleep"); err != nil || len(got) == 0 || len(hostmem.Intersect(got, before)) != 0 {
		t.Errorf("to read beside a protected process: %v, %v", got, err)
	}
	delete(mem.words, at)
	// Whose memory cannot be told (the recording lacks it) is kept back as a whole.
	if got, err := look(true, "g-sleep"); err == nil || !strings.Contains(err.Error(), "what may not be touched") {
		t.Errorf("with a protected process that cannot be read: %v, %v", got, err)
	}
}

func TestSubtract(t *testing.T) {
	r := func(start, end uint64) hostmem.Range {
		return hostmem.Range{Start: hostmem.PhysAddr(start), Size: end - start}
	}
	for _, c := range []struct{ all, without, want []hostmem.Range }{
		{[]hostmem.Range{r(0, 10)}, nil, []hostmem.Range{r(0, 10)}},
		{[]hostmem.Range{r(0, 10)}, []hostmem.Range{r(0, 10)}, nil},
		{[]hostmem.Range{r(5, 10), r(20, 30)}, []hostmem.Range{r(22, 24), r(0, 6), r(9, 21)}, []hostmem.Range{r(6, 9), r(21, 22), r(24, 30)}},
		{[]hostmem.Range{r(1<<52, 1<<52+8)}, []hostmem.Range{r(0, 8)}, []hostmem.Range{r(1<<52, 1<<52+8)}},
	} {
		if got := subtract(c.all, c.without); !slices.Equal(got, c.want) {
			t.Errorf("%v without %v is %v; want %v", c.all, c.without, got, c.want)
		}
	}
}
