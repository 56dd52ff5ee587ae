package kernel

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// zone makes a zone of n bytes with a log that was written to it, which begins anew at its start when it is full.
func zone(n int, log string) []byte {
	b := make([]byte, n)
	size := min(len(log), n-zoneHeader)
	start := len(log) % (n - zoneHeader)
	binary.LittleEndian.PutUint32(b, zoneSignature)
	binary.LittleEndian.PutUint32(b[4:], uint32(start))
	binary.LittleEndian.PutUint32(b[8:], uint32(size))
	for i := range log {
		b[zoneHeader+i%(n-zoneHeader)] = log[i]
	}
	return b
}

func deflated(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.DefaultCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestZones(t *testing.T) {
	long := strings.Repeat("0123456789", 500)
	region := slices.Concat(zone(4096, "====1689345600.123456-C\n"+deflated(t, "Panic#2 Part1\nlast words")), make([]byte, 4096), zone(1024, long), zone(4096, ""))
	var got []string
	eachZone(region, func(content []byte) { got = append(got, string(content)) })
	if len(got) != 3 || got[1] != long[len(long)-(1024-zoneHeader):] || got[2] != "" {
		t.Fatalf("zones %q", got)
	}
	at, compressed, text, ok := dumpHeader([]byte(got[0]))
	if !ok || !compressed || at.UnixMicro() != 1689345600123456 {
		t.Fatalf("header: %v %v %v", at, compressed, ok)
	}
	if plain, err := inflate(text, 1000); err != nil || string(plain) != "Panic#2 Part1\nlast words" {
		t.Errorf("inflate = %q, %v", plain, err)
	}
	if plain, err := inflate(text, 5); err == nil || string(plain) != "Panic" {
		t.Errorf("inflate 5 bytes = %q, %v", plain, err)
	}
	if plain, err := inflate(text[:len(text)-6], 1000); err == nil || !strings.HasPrefix("Panic#2 Part1\nlast words", string(plain)) {
		t.Errorf("inflate what is cut off = %q, %v", plain, err)
	}
	if _, err := inflate([]byte("\x28\xb5\x2f\xfd"), 1000); err == nil {
		t.Error("zstd passes for deflate")
	}
	for _, bad := range []string{"", "====", "====1.2\n"[:7], "===1.2-C\n", "====1-C\n", "====1.2-X\n", "====-1.2-C\n", "====1.9999999-C\n"} {
		if _, _, _, ok := dumpHeader([]byte(bad)); ok {
			t.Errorf("%q passes for the header of a dump", bad)
		}
	}
	for _, bad := range [][2]uint32{{0, 4085}, {5, 4}, {1 << 31, 1 << 31}} {
		b := zone(4096, "")
		binary.LittleEndian.PutUint32(b[4:], bad[0])
		binary.LittleEndian.PutUint32(b[8:], bad[1])
		if zoneContent(b) != nil {
			t.Errorf("a zone that says start %d, size %d is believed", bad[0], bad[1])
		}
	}
}

func TestRamoopsParameters(t *testing.T) {
	for line, want := range map[string]string{
		"quiet ramoops.mem_address=0x18000000 ramoops.mem_size=1048576 ramoops.ecc=1": "402653184 1048576 ",
		"ramoops.mem_size=0x1 ramoops.mem_size=0x2":                                   "0 2 ",
		"reserve_mem=2M:4096:oops ramoops.mem_name=oops":                              "0 0 oops",
		"ramoops.mem_address=nonsense":                                                "0 0 ",
	} {
		address, size, name := ramoopsParameters(line)
		if got := fmt.Sprint(address, size, " ", name); got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

func FuzzZones(f *testing.F) {
	f.Add(slices.Concat(zone(2048, "====1.2-C\n"+deflated(f, "Oops#1 Part1\nx")), zone(2048, strings.Repeat("x", 4000))))
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		eachZone(b, func(content []byte) {
			total += len(content)
			if _, compressed, text, ok := dumpHeader(content); ok && compressed {
				if plain, _ := inflate(text, 1<<16); len(plain) > 1<<16 {
					t.Errorf("%d bytes", len(plain))
				}
			}
		})
		if total > len(b) {
			t.Errorf("%d bytes of zones in %d", total, len(b))
		}
	})
}

// TestPstore lets a kernel die that has ramoops, and reads what it left: while it is dead, and from its successor before that has loaded the
// driver, then before pstore is mounted, and then. The successor's own files say what must come out. That Debian's kernels do not
// write console and pmsg is made up for: their zones are written from outside between the two, as a kernel does.
func TestPstore(t *testing.T) {
	someGuests(t, 1, func(t *testing.T, kernel string) {
		const at, size = 0x18000000, 0x100000
		g := startGuest(t, kernel, guestOptions{modules: []string{"ramoops"}, cmdline: fmt.Sprintf("memmap=%#[2]x$%#[1]x ramoops.mem_address=%#[1]x ramoops.mem_size=%#[2]x "+
			"ramoops.record_size=0x8000 ramoops.console_size=0x10000 ramoops.ftrace_size=0 ramoops.pmsg_size=0x8000", at, size)})
		img := g.attach(Options{})
		read := func() Pstore {
			t.Helper()
			p, err := img.View(t.Context()).Pstore()
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		load := func() {
			t.Helper()
			var said string
			if g.ask(&said, "ramoops"); said != "ok" {
				t.Fatal(said)
			}
		}
		if p := read(); p.Backend == "ramoops" || len(p.Records) > 0 {
			t.Fatalf("before anything: %+v", p)
		}
		load()
		if p := read(); p.Backend != "ramoops" || len(p.Records) > 0 {
			t.Fatalf("with an empty ramoops: %+v", p)
		}
		g.send("sysrq c")
		g.await(img, func(p PanicState) bool { return p.Panicked })
		var died []PstoreRecord
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			p, err := img.View(t.Context()).Pstore() // fails while a record is being written
			if err == nil && slices.ContainsFunc(p.Records, func(r PstoreRecord) bool { return r.Reason == "Panic" && r.Part == 1 && r.Problem == "" }) {
				died = p.Records
				break
			}
			if time.Now().After(end) {
				t.Fatalf("the dead kernel's records: %+v, %v", p, err)
			}
		}
		for _, r := range died {
			if !r.ThisBoot || r.Type != "dmesg" || r.Problem != "" {
				t.Errorf("of the dead kernel: %+v", r)
			}
		}
		ram, err := os.OpenFile(g.ram, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer ram.Close()
		console, pmsg := strings.Repeat("a line of the console that was\n", 3000), "a message of a program"
		for where, z := range map[int64][]byte{at + 0xe8000: zone(0x10000, console), at + 0xf8000: zone(0x8000, pmsg)} {
			if _, err := ram.WriteAt(z, where); err != nil {
				t.Fatal(err)
			}
		}
		g.execute("system_reset")
		g.ready()
		img = g.attach(Options{})
		texts := func(p Pstore) map[string]string {
			all := make(map[string]string)
			for _, r := range p.Records {
				all[r.Name] = r.Text
				if r.ThisBoot || r.Problem != "" {
					t.Errorf("%s: of this boot %v, %s", r.Name, r.ThisBoot, r.Problem)
				}
			}
			return all
		}
		early := texts(read())
		load()
		loaded := texts(read())
		var files map[string]string
		g.ask(&files, "pstore")
		p := read()
		if !p.Mounted {
			t.Errorf("pstore is mounted: %+v", p)
		}
		for name, text := range files {
			files[name] = printable([]byte(text))
		}
		if files["console-ramoops-0"] != console[len(console)-(0x10000-zoneHeader):] || files["pmsg-ramoops-0"] != pmsg || !strings.Contains(files["dmesg-ramoops-0"], "sysrq") {
			t.Fatalf("the guest has %q", slices.Sorted(maps.Keys(files)))
		}
		if d := cmp.Diff(files, texts(p)); d != "" {
			t.Errorf("mounted: -the guest has, +got\n%s", d)
		}
		if _, err := img.View(t.Context()).ModuleField("ramoops", "ramoops_context", "cprz"); err == nil {
			if d := cmp.Diff(files, loaded); d != "" {
				t.Errorf("loaded: -the guest has, +got\n%s", d)
			}
		} else { // no kernel tells modules' types before v5.11: the zones alone, where console and pmsg are begun anew by then
			t.Log(err)
		}
		files["log-ramoops-0"], files["log-ramoops-1"] = files["console-ramoops-0"], files["pmsg-ramoops-0"]
		delete(files, "console-ramoops-0")
		delete(files, "pmsg-ramoops-0")
		if d := cmp.Diff(files, early); d != "" {
			t.Errorf("not loaded: -the guest has, +got\n%s", d)
		}
		for i, r := range p.Records[1:] {
			if b := p.Records[i]; r.Time.Before(b.Time) || r.Time.Equal(b.Time) && r.Part > b.Part {
				t.Errorf("%s of %v, part %d, is behind %s of %v, part %d", r.Name, r.Time, r.Part, b.Name, b.Time, b.Part)
			}
		}
		if len(died) > len(files)-2 { // less if the last was still to be written
			t.Errorf("%d dumps of the dead kernel, %d of the guest's", len(died), len(files)-2)
		}
	})
}
