package kernel

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// openRecorded attaches to a recording and returns the frame memories, too: img reads the frame that is switched to.
func openRecorded(tb testing.TB, rec *hostmem.Recording) (*Image, *frames) {
	tb.Helper()
	note, err := strconv.ParseUint(rec.Labels()["note"], 10, 64)
	if err != nil {
		tb.Fatal(err)
	}
	m := &frames{rec: rec, at: rec.Frame(frameAlive)}
	img, err := Open(context.Background(), m, Options{Hint: Hint{Note: hostmem.PhysAddr(note)}, NoteOnly: true})
	if err != nil {
		tb.Fatal(err)
	}
	return img, m
}

// frames is a recording that can go back, too.
type frames struct {
	rec *hostmem.Recording
	at  hostmem.Memory
}

func (m *frames) show(frame int)                          { m.at = m.rec.Frame(frame) }
func (m *frames) Map() []hostmem.Range                    { return m.at.Map() }
func (m *frames) Resident() []hostmem.Range               { return hostmem.ResidentRanges(m.at) }
func (m *frames) Close() error                            { return nil }
func (m *frames) ReadAt(b []byte, off int64) (int, error) { return m.at.ReadAt(b, off) }

// hooked calls f, once, when its memory is read at an address.
type hooked struct {
	*frames
	at hostmem.PhysAddr
	f  func()
}

func (m *hooked) ReadAt(b []byte, off int64) (int, error) {
	if f := m.f; f != nil && off <= int64(m.at) && int64(m.at) < off+int64(len(b)) {
		m.f = nil
		f()
	}
	return m.frames.ReadAt(b, off)
}

// A proof whose reading of the clock is older than that of another one, which began later and ended first, has not seen time go back.
func TestProveAtTheSameTime(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		if name != "6.12" {
			return
		}
		found, mem := openRecorded(t, rec)
		va, err := found.Symbol("iomem_resource")
		if err != nil {
			t.Fatal(err)
		}
		at, err := found.View(t.Context()).Phys(va)
		if err != nil {
			t.Fatal(err)
		}
		m := &hooked{frames: mem, at: at}
		img, err := Open(t.Context(), m, Options{Hint: Hint{Note: found.Info().Note}, NoteOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		img.proofs.Store(ramEvery - 1) // the next one reads the map of RAM, behind the clock
		before := img.lastMono.Load()
		m.f = func() {
			if now, err := img.Panicked(t.Context()); err != nil || now {
				t.Errorf("Panicked = %v, %v", now, err)
			}
			if r, err := img.View(t.Context()).RehearsePanic(); err != nil || !r.Panicked || r.CPU != 0 || r.Task == nil {
				t.Errorf("RehearsePanic = %+v, %v", r, err)
			}
			mem.show(frameLater)
			defer mem.show(frameAlive)
			if err := img.Prove(t.Context()); err != nil {
				t.Errorf("the later proof: %v", err)
			}
		}
		if err := img.Prove(t.Context()); err != nil || m.f != nil {
			t.Errorf("the earlier proof: %v; whether it was overtaken: %v", err, m.f == nil)
		}
		if img.lastMono.Load() <= before {
			t.Error("the clock of the later proof is forgotten")
		}
		if err := img.Prove(t.Context()); !errors.Is(err, ErrGone) {
			t.Errorf("a proof of the earlier memory: %v; want ErrGone", err)
		}
	})
}

func TestRecorded(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			img, mem := openRecorded(t, rec)
			info := img.Info()
			if info.Release != rec.Labels()["release"] || info.BootID != rec.Labels()["bootID"] || info.Hostname != "guest" ||
				info.CPUs != 2 || info.Arch != rec.Labels()["arch"] || info.KASLR != 0 {
				t.Errorf("Info = %+v", info)
			}
			for _, r := range info.Rungs {
				if !r.OK && r.Name != "alive" {
					t.Errorf("rung %s: %s", r.Name, r.Detail)
				}
			}
			v := img.View(t.Context())
			var want []guestThread
			if err := json.Unmarshal([]byte(rec.Labels()["ps"]), &want); err != nil {
				t.Fatal(err)
			}
			got := make(map[int]Task)
			for task, err := range v.Tasks() {
				if err != nil {
					t.Fatal(err)
				}
				got[task.PID] = task
			}
			compareTasks(t, got, want)
			var records []guestRecord
			if err := json.Unmarshal([]byte(rec.Labels()["dmesg"]), &records); err != nil {
				t.Fatal(err)
			}
			log := make(map[uint64]LogRecord)
			for r, err := range v.Log() {
				if err != nil {
					t.Fatal(err)
				}
				log[r.Seq] = r
			}
			compareLog(t, log, records)

			// The same question to the same View costs nothing but the second look at each task.
			before := v.Cost()
			for range v.Tasks() {
			}
			for range v.Log() {
			}
			if d := v.Cost().Pages - before.Pages; d != 0 {
				t.Errorf("%d pages were read twice", d)
			}

			first, err := v.Heartbeat()
			if err != nil {
				t.Fatal(err)
			}
			if p, err := v.Panic(); err != nil || p.Panicked || p.CPU != -1 {
				t.Errorf("Panic = %+v, %v", p, err)
			}
			mem.show(frameLater)
			later, err := v.Heartbeat()
			if err != nil {
				t.Fatal(err)
			}
			if !later.progressed(first) || first.progressed(first) || later.Jiffies < first.Jiffies || later.Mono < first.Mono ||
				later.Mono > first.Mono+int64(time.Minute) {
				t.Errorf("from %+v to %+v", first, later)
			}
			for i, c := range later.CPUs {
				if c.ID != i || !c.Online || c.Clock < first.CPUs[i].Clock || c.Switches < first.CPUs[i].Switches || c.CurrComm == "" {
					t.Errorf("CPU %d from %+v to %+v", i, first.CPUs[i], c)
				}
			}
			if err := img.Prove(t.Context()); err != nil {
				t.Error(err)
			}
			mem.show(framePanic)
			if now, err := img.Panicked(t.Context()); err != nil || !now {
				t.Errorf("Panicked = %v, %v of a kernel that has", now, err)
			}
			p, err := v.Panic()
			if err != nil || !p.Panicked || p.CPU < 0 || p.Task == nil || p.Task.TGID != 1 ||
				p.Message != "Kernel panic - not syncing: sysrq triggered crash" {
				t.Errorf("Panic = %+v, %v", p, err)
			}
			if err := img.Prove(t.Context()); err != nil {
				t.Errorf("Prove of the dead kernel: %v", err)
			}
			mem.show(frameReboot)
			if err := img.Prove(t.Context()); !errors.Is(err, ErrGone) {
				t.Errorf("Prove after a reboot = %v; want ErrGone", err)
			}
			mem.show(frameAlive)
			if err := img.Prove(t.Context()); !errors.Is(err, ErrGone) {
				t.Errorf("Prove when the clock went back = %v; want ErrGone", err)
			}
		})
	})
}

// TestOpenRecorded searches for the kernel, as Options{} does.
func TestOpenRecorded(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			var stages []string
			img, err := Open(t.Context(), rec.Frame(frameAlive), Options{Progress: func(stage string, done, total uint64) {
				if done > total {
					t.Errorf("progress %d of %d", done, total)
				}
				if !slices.Contains(stages, stage) {
					stages = append(stages, stage)
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			if img.Info().BootID != rec.Labels()["bootID"] || len(stages) == 0 {
				t.Errorf("Info = %+v, stages %v", img.Info(), stages)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := Open(ctx, rec.Frame(frameAlive), Options{}); !errors.Is(err, context.Canceled) {
				t.Errorf("Open with an ended context = %v", err)
			}
			for _, err := range img.View(ctx).Tasks() {
				if !errors.Is(err, context.Canceled) {
					t.Errorf("Tasks with an ended context = %v", err)
				}
			}
		})
	})
}

// TestOpenDamaged attaches to kernels with a part that is missing or wrong.
func TestOpenDamaged(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		if name != "6.12" {
			return
		}
		img, _ := openRecorded(t, rec)
		phys := func(symbol string) hostmem.PhysAddr {
			va, err := img.Symbol(symbol)
			if err != nil {
				t.Fatal(err)
			}
			pa, err := img.View(t.Context()).Phys(va)
			if err != nil {
				t.Fatal(err)
			}
			return pa
		}
		known := func(symbol string) hostmem.PhysAddr {
			va, _ := img.note.symbol(symbol)
			pa, err := img.View(t.Context()).Phys(va)
			if err != nil {
				t.Fatal(err)
			}
			return pa
		}
		task := img.lay.task
		var corrupt *CorruptError
		for _, c := range []struct {
			name string
			at   hostmem.PhysAddr
			with string
			want error // nil: a *CorruptError
			rung string
		}{
			{"note half-written", img.Info().Note + 4, "\x00\x00\x00\x00", ErrNotYet, "note"},
			{"note of noise", img.Info().Note + 40, "\x01\x02\x03", ErrNotYet, "note"},
			{"no kallsyms in VMCOREINFO", findText(t, img, "SYMBOL(kallsyms_names)"), "SYMBOL(kallsyms_nomes)", ErrNotSupported, "kallsyms"},
			{"encrypted", findText(t, img, "NUMBER(sme_mask)=0"), "NUMBER(sme_mask)=1", ErrNotSupported, "paging"},
			{"other page size", findText(t, img, "PAGESIZE=4096"), "PAGESIZE=8192", ErrNotSupported, "paging"},
			{"page table", known("init_top_pgt") + 0xff8, "\x00", ErrNotMapped, "paging"},
			{"symbols", known("kallsyms_num_syms"), "\xff\xff\xff\xff", nil, "kallsyms"},
			{"token table", known("kallsyms_token_index") + 20, "\xff\xff", nil, "kallsyms"},
			{"note pointer", phys("vmcoreinfo_note"), "\x00\x10\x20", nil, "memory map"},
			{"direct map", phys("page_offset_base"), "\x00\x00\x00\x40", nil, "memory map"},
			{"CPUs", phys("nr_cpu_ids"), "\x00\x00\x00\x00", nil, "memory map"},
			{"BTF magic", phys("__start_BTF"), "\x00\x00", nil, "btf"},
			{"BTF types", phys("__start_BTF") + 24 + 7, "\x1f", nil, "btf"},
			{"banner", phys("linux_banner"), "Windows version", nil, "proof"},
			{"init_task's name", phys("init_task") + hostmem.PhysAddr(task.comm), "explorer", nil, "proof"},
			{"init_task alone", phys("init_task") + hostmem.PhysAddr(task.tasks), string(binary.LittleEndian.AppendUint64(nil, uint64(task.init)+task.tasks)), ErrNotYet, "proof"},
			{"task list", phys("init_task") + hostmem.PhysAddr(task.tasks), "\x01\x02\x03", nil, "proof"},
		} {
			t.Run(c.name, func(t *testing.T) {
				mem := overlay{rec.Frame(frameAlive), make(map[hostmem.PhysAddr]byte)}
				for i, b := range []byte(c.with) {
					mem.bytes[c.at+hostmem.PhysAddr(i)] = b
				}
				_, err := Open(t.Context(), mem, Options{Hint: Hint{Note: img.Info().Note}, NoteOnly: true})
				var attach *AttachError
				if !errors.As(err, &attach) || len(attach.Rungs) == 0 {
					t.Fatalf("Open = %v; want an *AttachError", err)
				}
				if last := attach.Rungs[len(attach.Rungs)-1]; last.OK || last.Name != c.rung {
					t.Errorf("failed at %q (%s); want %q", last.Name, last.Detail, c.rung)
				}
				if c.want == nil && !errors.As(err, &corrupt) || c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("Open = %v; want %v", err, c.want)
				}
			})
		}
	})
}

// findText returns where in the note a text is.
func findText(t *testing.T, img *Image, text string) hostmem.PhysAddr {
	t.Helper()
	for i := range len(img.note.text) - len(text) {
		if img.note.text[i:i+len(text)] == text {
			return img.note.pa + noteHeaderLen + hostmem.PhysAddr(i)
		}
	}
	t.Fatalf("no %q in the note", text)
	return 0
}

func TestOpenNothing(t *testing.T) {
	random := make(flat, 1<<20)
	for i := range random {
		random[i] = byte(uint32(i) * 2654435761 >> 13)
	}
	for name, mem := range map[string]hostmem.Memory{
		"nothing": flat(nil), "a byte": make(flat, 1), "zeroes": make(flat, 5<<20), "noise": random,
	} {
		_, err := Open(t.Context(), mem, Options{})
		if !errors.Is(err, ErrNotFound) || errors.Is(err, ErrNotYet) {
			t.Errorf("%s: Open = %v; want ErrNotFound", name, err)
		}
		if _, err := Open(t.Context(), mem, Options{Hint: Hint{Note: 0x1000}}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: Open with a note = %v; want ErrNotFound", name, err)
		}
	}
}

// FuzzOpen attaches to kernels of which some bytes are others.
func FuzzOpen(f *testing.F) {
	type subject struct {
		mem   hostmem.Memory
		note  hostmem.PhysAddr
		pages []hostmem.PhysAddr
	}
	var subjects []subject
	recorded(f, func(name string, rec *hostmem.Recording) {
		if name == "6.1" || name == "6.12" {
			return // with so many of their symbols and types they take too long
		}
		img, mem := openRecorded(f, rec)
		subjects = append(subjects, subject{rec.Frame(frameAlive), img.Info().Note, pagesOf(mem)})
	})
	f.Add(uint8(0), []byte{1, 0, 16, 0, 8, 7, 6, 5, 4, 3, 2, 1})
	f.Add(uint8(1), make([]byte, 24))
	f.Fuzz(func(t *testing.T, which uint8, changes []byte) {
		s := subjects[int(which)%len(subjects)]
		all := slices.Concat(listings, objectListings)
		listing := all[int(which)/len(subjects)%len(all)] // one at a time, so that many inputs are tried
		mem := overlay{s.mem, make(map[hostmem.PhysAddr]byte)}
		for ; len(changes) >= 12 && len(mem.bytes) < 256; changes = changes[12:] {
			at := s.pages[int(le16(changes))%len(s.pages)] + hostmem.PhysAddr(le16(changes[2:])&0xff8)
			for i, b := range changes[4:12] {
				if b != 0 { // keeps what is there
					mem.bytes[at+hostmem.PhysAddr(i)] = b
				}
			}
		}
		img, err := Open(t.Context(), mem, Options{Hint: Hint{Note: s.note}, NoteOnly: true})
		if (img == nil) == (err == nil) {
			t.Fatalf("Open = %v, %v", img, err)
		}
		if err != nil {
			return
		}
		v := img.View(t.Context())
		for range v.Tasks() {
		}
		for range v.Log() {
		}
		_, _ = v.Heartbeat()
		_, _ = v.Panic()
		_, _ = listing.ask(v)
		_ = img.Prove(t.Context())
	})
}

// pagesOf returns the pages of a recording's frame.
func pagesOf(mem hostmem.Memory) (pages []hostmem.PhysAddr) {
	for _, r := range hostmem.ResidentRanges(mem) {
		for pa := r.Start; pa < r.End(); pa += hostmem.PageSize {
			pages = append(pages, pa)
		}
	}
	return pages
}

// FuzzRecorded changes what the kernels of the recordings have in memory, and asks everything.
func FuzzRecorded(f *testing.F) {
	type subject struct {
		img   *Image
		mem   *frames
		pages []hostmem.PhysAddr
	}
	var subjects []subject
	recorded(f, func(name string, rec *hostmem.Recording) {
		img, mem := openRecorded(f, rec)
		mem.show(framePanic) // has no pages of the attach
		subjects = append(subjects, subject{img, mem, pagesOf(mem)})
	})
	f.Add(uint8(0), []byte{1, 0, 16, 0, 8, 7, 6, 5, 4, 3, 2, 1})
	f.Add(uint8(1), make([]byte, 120))
	f.Fuzz(func(t *testing.T, which uint8, changes []byte) {
		s := subjects[int(which)%len(subjects)]
		mem := overlay{s.mem.at, make(map[hostmem.PhysAddr]byte)}
		// Each change is a page, an offset, and eight bytes: a value, or the address of another page in the direct map.
		for ; len(changes) >= 12 && len(mem.bytes) < 1024; changes = changes[12:] {
			page := s.pages[int(le16(changes))%len(s.pages)]
			at := page + hostmem.PhysAddr(le16(changes[2:])&0xff8)
			value := le64(changes[4:])
			if le16(changes[2:])&1 != 0 {
				to := s.pages[int(le16(changes[4:]))%len(s.pages)]
				value = uint64(s.img.space.linear[1].start) + uint64(to) + uint64(le16(changes[6:])&0xfff)
			}
			for i := range 8 {
				mem.bytes[at+hostmem.PhysAddr(i)] = byte(value >> (8 * i))
			}
		}
		img := s.img.with(mem)
		v := img.View(t.Context())
		n := 0
		for task, err := range v.Tasks() {
			if n++; n > maxTasks+1 {
				t.Fatal("tasks without end")
			}
			if err == nil && (task.PID < 0 || task.TGID < 0 || task.PPID < 0 || len(task.State) != 1 || task.CPU >= len(img.perCPU)) {
				t.Errorf("task = %+v", task)
			}
		}
		for _, err := range v.Log() {
			if n++; err == nil && n > maxTasks+(1<<ringMaxRecordBits) {
				t.Fatal("records without end")
			}
		}
		_, _ = v.Heartbeat()
		_, _ = v.Panic()
		_, _ = img.systemRAM(v)
		for _, l := range slices.Concat(listings, objectListings) {
			_, _ = l.ask(v)
		}
		_ = compareModules(v)
		_ = img.Prove(t.Context())
	})
}

// with returns the same kernel in another memory.
func (img *Image) with(mem hostmem.Memory) *Image {
	return &Image{whole: mem, mem: mem, arch: img.arch, space: img.space, note: img.note, syms: img.syms, types: img.types, lay: img.lay,
		ram: img.ram, info: img.info, pageSize: img.pageSize, perCPU: img.perCPU, perCPUStart: img.perCPUStart,
		perCPUEnd: img.perCPUEnd, identity: img.identity, panic: img.panic, beat: img.beat, usage: img.usage}
}
