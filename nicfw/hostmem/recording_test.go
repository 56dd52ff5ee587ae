package hostmem_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
)

func TestRecordingHoldsOnlyWhatWasRead(t *testing.T) {
	ram := ramFile(t, true)
	r := hostmem.NewRecorder(ram)
	r.Label("note", "0x1000")
	read := func(mem hostmem.Memory, pa int64) byte {
		t.Helper()
		b := make([]byte, 1)
		if _, err := mem.ReadAt(b, pa); err != nil {
			t.Fatalf("ReadAt(%#x) = %v", pa, err)
		}
		return b[0]
	}
	write := func(pa int64, v byte) {
		t.Helper()
		if _, err := ram.WriteAt([]byte{v}, pa); err != nil {
			t.Fatal(err)
		}
	}
	write(0x1000, 1)
	write(0x8000, 1)
	read(r, 0x1000)
	read(r, 0x8000)
	write(0x1000, 2)
	if got := read(r, 0x1000); got != 1 {
		t.Errorf("second read in a frame = %d; want what was recorded, 1", got)
	}
	r.NextFrame()
	r.NextFrame() // an empty frame is left out
	if got := read(r, 0x1000); got != 2 {
		t.Errorf("read in the next frame = %d; want 2", got)
	}
	read(r, 1<<32+5*page)

	var b bytes.Buffer
	if n, err := r.WriteTo(&b); err != nil || n != int64(b.Len()) {
		t.Fatalf("WriteTo = %d, %v; wrote %d", n, err, b.Len())
	}
	rec, err := hostmem.OpenRecording(&b)
	if err != nil {
		t.Fatal(err)
	}
	if got := rec.Labels()["note"]; got != "0x1000" || rec.Frames() != 2 {
		t.Errorf("label note = %q, %d frames; want 0x1000, 2", got, rec.Frames())
	}
	check := func(mem *hostmem.Recording, want byte, resident ...hostmem.Range) {
		t.Helper()
		if got := read(mem, 0x1000); got != want {
			t.Errorf("replayed byte = %d; want %d", got, want)
		}
		if got := mem.Resident(); !slices.Equal(got, resident) {
			t.Errorf("Resident() = %v; want %v", got, resident)
		}
	}
	first := []hostmem.Range{{0x1000, page}, {0x8000, page}}
	second := []hostmem.Range{{0x1000, page}, {1<<32 + 5*page, page}}
	check(rec, 1, first...)

	// The fault is that of the recording in RAM that was not read, and the host's outside.
	buf := make([]byte, 3*page)
	k, err := rec.ReadAt(buf, 0x1800)
	fault, ok := errors.AsType[*hostmem.FaultError](err)
	if !ok || k != 0x800 || fault.Addr != 0x2000 || fault.Len != len(buf)-k || !errors.Is(err, hostmem.ErrNotRecorded) {
		t.Errorf("ReadAt(3 pages, 0x1800) = %d, %v; want %v at 0x2000", k, err, hostmem.ErrNotRecorded)
	}
	if _, err := rec.ReadAt(buf, 0x4000); !errors.Is(err, hostmem.ErrNotMapped) {
		t.Errorf("ReadAt in a hole = %v; want %v", err, hostmem.ErrNotMapped)
	}

	if !rec.NextFrame() {
		t.Fatal("NextFrame() = false at the first of two")
	}
	check(rec, 2, second...)
	if _, err := rec.ReadAt(buf[:1], 0x8000); !errors.Is(err, hostmem.ErrNotRecorded) {
		t.Errorf("ReadAt of a page of the first frame in the second = %v; want %v", err, hostmem.ErrNotRecorded)
	}
	if rec.NextFrame() {
		t.Error("NextFrame() = true at the last frame")
	}
	check(rec, 2, second...)
	check(rec.Frame(0), 1, first...)
}

// A recorder reads from the memory at most once in a frame, and what faults it neither records nor hides.
func TestRecorderReadsEachPageOnce(t *testing.T) {
	e := hostmem.NewEngine(ramFile(t, false), fast)
	r := hostmem.NewRecorder(e)
	for range 10 {
		if _, err := r.ReadAt(make([]byte, page), 0x8800); err != nil {
			t.Fatal(err)
		}
	}
	segs := []hostmem.Segment{{Addr: 0x8004, Buf: make([]byte, 4)}, {Addr: 0x9004, Buf: make([]byte, 4)}, {Addr: 0xa004, Buf: make([]byte, 4)}}
	if err := r.ReadScatter(segs); err != nil {
		t.Fatal(err)
	}
	if got := e.Stats().Bursts; got != 3 {
		t.Errorf("pages read from the memory: %d; want 3", got)
	}
}

func TestRecorderPassesFaultsOn(t *testing.T) {
	o := fast
	o.Outcome = func(op string, r hostmem.Range) hostmem.Outcome {
		if r.Start == 0x9000 {
			return hostmem.Aborts
		}
		return hostmem.Completes
	}
	r := hostmem.NewRecorder(hostmem.NewEngine(ramFile(t, false), o))
	k, err := r.ReadAt(make([]byte, 3*page), 0x8000)
	fault, ok := errors.AsType[*hostmem.FaultError](err)
	if !ok || k != page || fault.Addr != 0x9000 || fault.Len != 2*page || !errors.Is(err, hostmem.ErrAborted) {
		t.Errorf("ReadAt = %d, %v; want one page and %v at 0x9000", k, err, hostmem.ErrAborted)
	}
}

func TestRecordedTimes(t *testing.T) {
	ram := ramFile(t, false)
	synctest.Test(t, func(t *testing.T) {
		r := hostmem.NewRecorder(ram)
		start := time.Now()
		for range 3 {
			if _, err := r.ReadAt(make([]byte, 1), 0x1000); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			r.NextFrame()
		}
		var b bytes.Buffer
		if _, err := r.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		rec, err := hostmem.OpenRecording(&b)
		if err != nil {
			t.Fatal(err)
		}
		for i := range rec.Frames() {
			if got, want := rec.Time(i), start.Add(time.Duration(i)*time.Second); !got.Equal(want) {
				t.Errorf("Time(%d) = %v; want %v", i, got, want)
			}
		}
	})
}

// Pages that did not change since the frame before cost next to nothing.
func TestRecordingIsSmall(t *testing.T) {
	r := hostmem.NewRecorder(ramFile(t, false))
	size := func() int64 {
		var b bytes.Buffer
		n, err := r.WriteTo(&b)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	buf := make([]byte, 40*page)
	if _, err := r.ReadAt(buf, 1<<32); err != nil {
		t.Fatal(err)
	}
	one := size()
	for range 9 {
		r.NextFrame()
		if _, err := r.ReadAt(buf, 1<<32); err != nil {
			t.Fatal(err)
		}
	}
	if ten := size(); ten > one+4096 {
		t.Errorf("one frame takes %d bytes, ten equal ones %d", one, ten)
	}
}

func TestDamagedRecordings(t *testing.T) {
	r := hostmem.NewRecorder(ramFile(t, false))
	if _, err := r.ReadAt(make([]byte, 100), 0x1000); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := r.WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	good := buf.Bytes()
	for n := range len(good) {
		if _, err := hostmem.OpenRecording(bytes.NewReader(good[:n])); err == nil {
			t.Errorf("the first %d of %d bytes are a recording, too", n, len(good))
		}
		bad := bytes.Clone(good)
		bad[n] ^= 0x10
		if rec, err := hostmem.OpenRecording(bytes.NewReader(bad)); err == nil {
			// zstd ignores a few bits of its headers; what it unpacked is summed.
			b := make([]byte, 100)
			want := make([]byte, 100)
			hostmemtest.Fill(want, 0x1000)
			if _, err := rec.ReadAt(b, 0x1000); err != nil || !bytes.Equal(b, want) {
				t.Errorf("with byte %d damaged the recording reads wrongly, %v", n, err)
			}
		}
	}
	for _, c := range []struct {
		b    []byte
		want string
	}{
		{[]byte("HOSTMEM"), "truncated"},
		{[]byte("something else, longer"), "not a .hostmem file"},
		{append([]byte("HOSTMEM\n\x02\x00\x00\x00"), good[12:]...), "version is 2: this program reads version 1"},
		{append(bytes.Clone(good), "more"...), "after the last record"},
	} {
		if _, err := hostmem.OpenRecording(bytes.NewReader(c.b)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("OpenRecording(%.12q…) = %v; want %q", c.b, err, c.want)
		}
	}
}

// unpack returns the body of a file.
func unpack(t testing.TB, file []byte) []byte {
	t.Helper()
	z, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	body, err := z.DecodeAll(file[12:], nil)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// FuzzRecording changes the records themselves, behind the compression and with the checksum put right. What is in front
// of them FuzzImage changes.
func FuzzRecording(f *testing.F) {
	const (
		ram   = "M\x01\x00\x00\x00" + "\x00\x10\x00\x00\x00\x00\x00\x00" + "\x00\x20\x00\x00\x00\x00\x00\x00"
		frame = "F\x00\x00\x00\x00\x00\x00\x00\x00"
		at    = "\x00\x10\x00\x00\x00\x00\x00\x00"
		sum   = "................................"
	)
	onePage := "P" + at + strings.Repeat("\x00", page)
	f.Add([]byte("L\x01k\x01\x00\x00\x00v" + ram + frame + onePage + frame + "S" + at +
		"E\x02\x00\x00\x00" + "\x02\x00\x00\x00\x00\x00\x00\x00" + sum))
	f.Add([]byte(ram + frame + "E\x01\x00\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00\x00" + sum))
	f.Fuzz(func(t *testing.T, body []byte) {
		rec, err := hostmem.ReadBody(hostmem.Resum(body))
		if (rec == nil) == (err == nil) {
			t.Fatalf("ReadBody = %v, %v; want a value or an error", rec, err)
		}
		if err != nil {
			return
		}
		for {
			walk(t, rec)
			if !rec.NextFrame() {
				break
			}
		}
	})
}

// Do not change this test, nor testdata/v1.hostmem: recordings of version 1 must be read for ever, and be written the
// same as long as there is no version 2.
func TestGoldenV1(t *testing.T) {
	file, err := os.ReadFile(filepath.Join("testdata", "v1.hostmem"))
	if err != nil {
		t.Fatal(err)
	}
	rec, err := hostmem.OpenRecording(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	wantMap := []hostmem.Range{{0x1000, 0x2000}, {1 << 32, 0x1800}}
	if !slices.Equal(rec.Map(), wantMap) {
		t.Errorf("Map() = %v; want %v", rec.Map(), wantMap)
	}
	if got := rec.Labels(); len(got) != 2 || got["kernel"] != "6.1.0-56-amd64" || got["note"] != "0x11f6000" {
		t.Errorf("Labels() = %v", got)
	}
	if rec.Frames() != 2 || rec.Time(0).UnixNano() != 946684800000000000 || rec.Time(1).UnixNano() != 946684801000000000 {
		t.Errorf("%d frames, at %v", rec.Frames(), rec.Time(0))
	}
	for i, want := range [][]hostmem.Range{
		{{0x1000, 0x1000}, {1<<32 + 0x1000, 0x800}},
		{{0x1000, 0x2000}},
	} {
		f := rec.Frame(i)
		if got := f.Resident(); !slices.Equal(got, want) {
			t.Errorf("frame %d: Resident() = %v; want %v", i, got, want)
		}
		for _, r := range want {
			got, wantBytes := make([]byte, r.Size), make([]byte, r.Size)
			for k := range wantBytes {
				a := uint64(r.Start) + uint64(k)
				wantBytes[k] = byte(a ^ a>>8)
			}
			if i == 1 && r.Start == 0x1000 {
				wantBytes[0x1010] = 0x77
			}
			if _, err := f.ReadAt(got, int64(r.Start)); err != nil || !bytes.Equal(got, wantBytes) {
				t.Errorf("frame %d: memory at %v is wrong, %v", i, r.Start, err)
			}
		}
	}
	body := unpack(t, file)
	const wantHead = "4c066b65726e656c0e000000362e312e302d35362d616d643634" + // label
		"4c046e6f746509000000307831316636303030" + // label
		"4d02000000" + "0010000000000000" + "0020000000000000" + "0000000001000000" + "0018000000000000" + // map
		"46" + "00004352cf4c230d" + // frame
		"50" + "0010000000000000" + "1011" // page
	if got := hex.EncodeToString(body[:len(wantHead)/2]); got != wantHead {
		t.Errorf("the body begins\n%s; want\n%s", got, wantHead)
	}

	// Recorded again, it is the same.
	synctest.Test(t, func(t *testing.T) {
		r := hostmem.NewRecorder(rec)
		r.Label("note", "0x11f6000")
		r.Label("kernel", "6.1.0-56-amd64")
		for i := range rec.Frames() {
			if i > 0 {
				time.Sleep(time.Second)
				rec.NextFrame()
				r.NextFrame()
			}
			for _, e := range rec.Resident() {
				if _, err := r.ReadAt(make([]byte, e.Size), int64(e.Start)); err != nil {
					t.Fatal(err)
				}
			}
		}
		var b bytes.Buffer
		if _, err := r.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(unpack(t, b.Bytes()), body) {
			t.Error("recorded again the body differs")
		}
	})
}
