package kernel

import (
	"bytes"
	"cmp"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Pstore is what kernels that died have left for the next (Documentation/admin-guide/ramoops.rst, fs/pstore).
type Pstore struct {
	// Backend is where this kernel keeps such records: ramoops, efi_pstore, erst, …; empty if it has none so far.
	Backend string `json:"backend,omitempty"`
	// Mounted says that the file system pstore is: then the records are what its files hold, as long as these are not removed.
	Mounted bool `json:"mounted"`
	// Records are the oldest first.
	Records []PstoreRecord `json:"records"`
}

// PstoreRecord is a piece of a log that outlived the kernel that wrote it.
type PstoreRecord struct {
	Name   string    `json:"name"`          // as in /sys/fs/pstore: dmesg-ramoops-0
	Type   string    `json:"type"`          // dmesg, console, pmsg, …; "log" of memory that only shows that it is one of the last two
	From   string    `json:"from"`          // "pstore", "ramoops", or "memory": found where the command line has ramoops keep them
	Time   time.Time `json:"time,omitzero"` // when it was written, by the host's clock
	Reason string    `json:"reason,omitempty"`
	// Part numbers the pieces of one dump, from its end: 1 is the latest.
	Part int `json:"part,omitempty"`
	// ThisBoot says that it was this kernel that wrote it, which has not been restarted since.
	ThisBoot bool   `json:"thisBoot,omitempty"`
	Text     string `json:"text"`
	// Problem says why the text is not all, or not there.
	Problem string `json:"problem,omitempty"`
}

const (
	maxPstoreRecords = 1 << 12
	maxPstoreBytes   = 16 << 20 // of all records, and of the memory they are in
	maxPstoreRecord  = 1 << 20  // of one, decompressed

	zoneSignature = 0x43474244 // PERSISTENT_RAM_SIG, fs/pstore/ram_core.c
	zoneHeader    = 12         // struct persistent_ram_buffer: sig, start, size
	// zoneStep is the size of the smallest zone that is looked for: each is a power of two, 4096 bytes if nothing is said.
	zoneStep = 1 << 10
)

// Pstore reads what earlier kernels left: the files of the file system pstore if it is mounted, whatever the backend; else the zones of
// ramoops, by that driver's own context or, before it is loaded, by the kernel's command line. A backend that keeps records out of
// memory shows none before pstore is mounted.
func (v *View) Pstore() (Pstore, error) {
	p, err := settle(v, v.pstore)
	if err != nil {
		return p, fmt.Errorf("read pstore: %w", err)
	}
	return p, nil
}

func (v *View) pstore() (Pstore, error) {
	w := pstoreWalk{v: v, p: Pstore{Records: []PstoreRecord{}}, left: maxPstoreBytes}
	r := resolver{img: v.img}
	w.info = r.symbol("psinfo")
	w.files = r.symbol("records_list")
	w.super = r.symbol("pstore_sb")
	info := r.shape("pstore_info", "name", "data")
	if errors.Is(r.err, ErrNotFound) {
		return w.p, r.err // built without
	}
	if r.err != nil {
		return w.p, r.err
	}
	super, err := v.pointer("pstore_sb", w.super)
	if err != nil {
		return w.p, err
	}
	w.p.Mounted = super != 0
	var context VirtAddr
	at, err := v.pointer("psinfo", w.info)
	if err != nil {
		return w.p, err
	}
	if at != 0 {
		t, err := v.thing(info, at)
		if err != nil {
			return w.p, err
		}
		if w.p.Backend, err = v.cstring("pstore_info", t.ptr("name"), 64); err != nil {
			return w.p, err
		}
		context = t.ptr("data")
	}
	if w.p.Mounted {
		err = w.mounted()
	} else if err = w.ramoops(context); errors.Is(err, ErrNotSupported) || errors.Is(err, ErrNotFound) {
		err = w.reserved()
	}
	if err != nil {
		return w.p, err
	}
	slices.SortStableFunc(w.p.Records, func(a, b PstoreRecord) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(b.Part, a.Part))
	})
	return w.p, nil
}

type pstoreWalk struct {
	v                  *View
	info, files, super VirtAddr
	p                  Pstore
	left               int // bytes that may still be read
}

// take makes room for n bytes of a record.
func (w *pstoreWalk) take(kind string, at VirtAddr, n uint64) ([]byte, error) {
	if len(w.p.Records) == maxPstoreRecords || n > uint64(w.left) {
		return nil, &CorruptError{kind, at, fmt.Sprintf("more than %d records or %d MiB of them", maxPstoreRecords, maxPstoreBytes>>20)}
	}
	w.left -= int(n)
	return make([]byte, n), nil
}

// add completes a record.
func (w *pstoreWalk) add(r PstoreRecord) {
	r.Text = strings.TrimRight(r.Text, "\x00")
	// pstore_dump begins each part with a line of its own: Panic#1 Part2.
	if first, _, ok := strings.Cut(r.Text, "\n"); ok && r.Type == "dmesg" {
		if reason, rest, ok := strings.Cut(first, "#"); ok && len(reason) < 32 {
			var count, part int
			if n, _ := fmt.Sscanf(rest, "%d Part%d", &count, &part); n == 2 {
				r.Reason, r.Part = printable([]byte(reason)), part
			}
		}
	}
	r.Text = printable([]byte(r.Text))
	r.ThisBoot = !r.Time.IsZero() && r.Time.After(w.v.img.info.BootTime) && !w.v.img.info.BootTime.IsZero()
	w.v.note(func(c *Confidence) { c.Objects++ })
	w.p.Records = append(w.p.Records, r)
}

// mounted lists the files (struct pstore_private, fs/pstore/inode.c).
func (w *pstoreWalk) mounted() error {
	v := w.v
	r := resolver{img: v.img}
	file := r.shape("pstore_private", "list[]", "record")
	record := r.shape("pstore_record", "type", "id", "time.tv_sec", "time.tv_nsec", "buf", "size", "compressed")
	if r.err != nil {
		return r.err
	}
	return v.list("pstore_private", w.files, file.offset("list"), maxPstoreRecords, func(at VirtAddr) error {
		f, err := v.thing(file, at)
		if err != nil {
			return err
		}
		t, err := v.thing(record, f.ptr("record"))
		if err != nil {
			return err
		}
		kind, err := v.img.types.enumName("pstore_type_id", int64(t.num("type")))
		if err != nil {
			return t.corrupt("is of type %d", t.num("type"))
		}
		kind = lowerName(kind, "PSTORE_TYPE_")
		b, err := w.take("pstore_record", t.addr(), t.num("size"))
		if err != nil {
			return err
		}
		if err := v.img.space.object(v, "pstore_record", t.ptr("buf"), b); err != nil {
			return err
		}
		rec := PstoreRecord{Name: fmt.Sprintf("%s-%s-%d", kind, w.p.Backend, t.num("id")), Type: kind, From: "pstore", Text: string(b)}
		if sec := int64(t.num("time.tv_sec")); sec > 0 && sec < 1<<40 {
			rec.Time = time.Unix(sec, int64(t.num("time.tv_nsec")%1e9)).UTC()
		}
		if t.num("compressed") != 0 { // it could not be decompressed there
			rec.Name, rec.Text, rec.Problem = rec.Name+".enc.z", "", "is compressed, and the host could not decompress it"
		}
		w.add(rec)
		return nil
	})
}

// ramoops reads the zones that the driver knows (struct ramoops_context, fs/pstore/ram.c), of which its module carries the types.
func (w *pstoreWalk) ramoops(context VirtAddr) error {
	v := w.v
	if w.p.Backend != "ramoops" {
		return ErrNotFound
	}
	types, err := v.moduleTypes("ramoops")
	if errors.Is(err, ErrNotFound) {
		types = v.img.types // built in
	} else if err != nil {
		return err
	}
	r := resolver{img: &Image{types: types}}
	driver := r.shape("ramoops_context", "dprzs", "max_dump_cnt", "cprz", "mprz")
	zone := r.shape("persistent_ram_zone", "paddr", "size", "old_log", "old_log_size")
	if r.err != nil {
		return r.err
	}
	t, err := v.thing(driver, context)
	if err != nil {
		return err
	}
	count := t.num("max_dump_cnt")
	if count > maxPstoreRecords {
		return t.corrupt("%d zones for dumps", count)
	}
	var dumps []VirtAddr
	if count > 0 {
		if dumps, err = v.pointers("ramoops_context", t.ptr("dprzs"), int(count)); err != nil {
			return err
		}
	}
	for i, at := range dumps {
		z, err := v.thing(zone, at)
		if err != nil {
			return err
		}
		b, err := w.physical(hostmem.PhysAddr(z.num("paddr")), z.num("size"))
		if err != nil {
			return err
		}
		if content := zoneContent(b); content != nil {
			w.dump(i, "ramoops", content)
		}
	}
	// Of the others the driver keeps a copy of what it found, and begins them anew.
	for kind, at := range map[string]VirtAddr{"console": t.ptr("cprz"), "pmsg": t.ptr("mprz")} {
		if at == 0 {
			continue
		}
		z, err := v.thing(zone, at)
		if err != nil {
			return err
		}
		if z.ptr("old_log") == 0 {
			continue
		}
		b, err := w.take("persistent_ram_zone", at, z.num("old_log_size"))
		if err != nil {
			return err
		}
		if err := v.img.space.object(v, "persistent_ram_zone", z.ptr("old_log"), b); err != nil {
			return err
		}
		w.add(PstoreRecord{Name: kind + "-ramoops-0", Type: kind, From: "ramoops", Text: string(b)})
	}
	return nil
}

// reserved looks for zones where the command line says that ramoops keeps them.
func (w *pstoreWalk) reserved() error {
	start, size, err := w.region()
	if err != nil || size == 0 {
		return err
	}
	b, err := w.physical(start, size)
	if err != nil {
		return err
	}
	dumps, logs := 0, 0
	eachZone(b, func(content []byte) {
		if len(w.p.Records) == maxPstoreRecords {
			return
		}
		if _, _, _, ok := dumpHeader(content); ok {
			w.dump(dumps, "memory", content)
			dumps++
		} else if len(content) > 0 {
			w.add(PstoreRecord{Name: fmt.Sprintf("log-ramoops-%d", logs), Type: "log", From: "memory", Text: string(content)})
			logs++
		}
	})
	return nil
}

// region returns where the command line has ramoops keep its zones; size is zero if it does not say.
func (w *pstoreWalk) region() (start hostmem.PhysAddr, size uint64, err error) {
	v := w.v
	r := resolver{img: v.img}
	line := r.symbol("saved_command_line")
	if r.err != nil {
		return 0, 0, r.err
	}
	p, err := v.pointer("saved_command_line", line)
	if err != nil {
		return 0, 0, err
	}
	text, err := v.cstring("saved_command_line", p, maxCommandLine)
	if err != nil {
		return 0, 0, err
	}
	address, size, name := ramoopsParameters(text)
	if name == "" {
		return hostmem.PhysAddr(address), size, nil
	}
	// reserve_mem=SIZE:ALIGN:NAME has reserved it somewhere (struct reserve_mem_table, mm/memblock.c, since v6.12).
	table := r.symbol("reserved_mem_table")
	entry := r.shape("reserve_mem_table", "name[]", "start", "size")
	n := r.size("reserve_mem_table")
	if r.err != nil {
		return 0, 0, r.err
	}
	for i := range VirtAddr(8) { // RESERVE_MEM_MAX_ENTRIES
		t, err := v.thing(entry, table+i*VirtAddr(n))
		if err != nil || t.num("size") == 0 {
			return 0, 0, err
		}
		if t.text("name") == name {
			return hostmem.PhysAddr(t.num("start")), t.num("size"), nil
		}
	}
	return 0, 0, nil
}

// ramoopsParameters reads the driver's parameters from a kernel's command line, where the last of several counts.
func ramoopsParameters(line string) (address, size uint64, name string) {
	for _, word := range strings.Fields(line) {
		key, value, _ := strings.Cut(word, "=")
		n, err := strconv.ParseUint(value, 0, 64)
		switch {
		case key == "ramoops.mem_address" && err == nil:
			address = n
		case key == "ramoops.mem_size" && err == nil:
			size = n
		case key == "ramoops.mem_name":
			name = value
		}
	}
	return address, size, name
}

// physical reads reserved memory, which the kernel does not count among its RAM, of what the path to the host calls RAM.
func (w *pstoreWalk) physical(pa hostmem.PhysAddr, n uint64) ([]byte, error) {
	b, err := w.take("ramoops", VirtAddr(pa), n)
	if err != nil {
		return nil, err
	}
	v := w.v
	const piece = 1 << 20 // between looks at the context
	for at := 0; at < len(b); at += piece {
		if err := v.ctx.Err(); err != nil {
			return nil, err
		}
		part := b[at:min(at+piece, len(b))]
		read, err := v.img.whole.ReadAt(part, int64(pa)+int64(at))
		v.mu.Lock()
		v.count(read)
		v.mu.Unlock()
		if errors.Is(err, hostmem.ErrNotMapped) {
			return nil, fmt.Errorf("ramoops at %v, %d bytes: %w", pa, n, err)
		}
		if err != nil {
			return nil, err
		}
	}
	return b, nil
}

// dump adds the content of a zone that a dump was written to.
func (w *pstoreWalk) dump(i int, from string, content []byte) {
	at, compressed, text, ok := dumpHeader(content)
	if !ok {
		return
	}
	r := PstoreRecord{Name: fmt.Sprintf("dmesg-ramoops-%d", i), Type: "dmesg", From: from, Time: at, Text: string(text)}
	if compressed {
		plain, err := inflate(text, min(maxPstoreRecord, w.left))
		if err != nil {
			r.Problem = err.Error()
		}
		w.left -= len(plain)
		r.Text = string(plain)
	}
	w.add(r)
}

// eachZone calls f with the content of each zone in a region, which begin at any multiple of zoneStep.
func eachZone(b []byte, f func(content []byte)) {
	for at := 0; at+zoneHeader < len(b); {
		content := zoneContent(b[at:])
		if content == nil {
			at += zoneStep
			continue
		}
		f(content)
		at += (zoneHeader + len(content) + zoneStep - 1) &^ (zoneStep - 1)
	}
}

// zoneContent returns what was written to a zone (struct persistent_ram_buffer), the oldest first; nil if it is none, or none that is whole.
func zoneContent(b []byte) []byte {
	if len(b) < zoneHeader || le32(b) != zoneSignature {
		return nil
	}
	start, size := uint64(binary.LittleEndian.Uint32(b[4:])), uint64(le32(b[8:]))
	data := b[zoneHeader:]
	if size > uint64(len(data)) || start > size {
		return nil
	}
	return append(append(make([]byte, 0, size), data[start:size]...), data[:start]...)
}

// dumpHeader parses the line that ramoops_write_kmsg_hdr puts before a dump: ====1689345600.123456-C. C is compressed, D is not, as without
// a letter.
func dumpHeader(b []byte) (at time.Time, compressed bool, text []byte, ok bool) {
	line, _, found := bytes.Cut(b[:min(len(b), 64)], []byte("\n"))
	rest, is := bytes.CutPrefix(line, []byte("===="))
	if !found || !is {
		return at, false, nil, false
	}
	text = b[len(line)+1:]
	stamp, kind, _ := strings.Cut(string(rest), "-")
	s, us, dot := strings.Cut(stamp, ".")
	sec, err1 := strconv.ParseInt(s, 10, 64)
	micros, err2 := strconv.ParseUint(us, 10, 32)
	if !dot || err1 != nil || err2 != nil || sec < 0 || sec >= 1<<40 || micros > 999999 || kind != "" && kind != "C" && kind != "D" {
		return at, false, nil, false
	}
	return time.Unix(sec, int64(micros)*1000).UTC(), kind == "C", text, true
}

// inflate undoes raw deflate, what pstore compresses with since v6.6, and before if it is built to, as Debian's. Of a damaged stream it
// returns what comes before the damage.
func inflate(b []byte, limit int) ([]byte, error) {
	r := flate.NewReader(bytes.NewReader(b))
	defer r.Close()
	plain, err := io.ReadAll(io.LimitReader(r, int64(limit)))
	switch {
	case len(plain) == limit:
		return plain, fmt.Errorf("is cut after %d bytes", limit)
	case err != nil && len(plain) == 0:
		return nil, errors.New("is compressed, but not by deflate, or damaged")
	case err != nil:
		return plain, errors.New("is damaged behind its text")
	}
	return plain, nil
}
