package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// memDevice is a device in memory whose power can fail: durable is what a restart finds, and of what was written since the
// last Sync any block may have got there, or a part of it.
type memDevice struct {
	data    []byte
	durable []byte
	onBlock func(n int) error // called before each block is written
	blocks  int
	syncErr error
}

func newMemDevice(size int) *memDevice {
	return &memDevice{data: make([]byte, size), durable: make([]byte, size)}
}

var errPower = errors.New("power failed")

func (d *memDevice) ReadAt(b []byte, off int64) (int, error) {
	return bytes.NewReader(d.data).ReadAt(b, off)
}

func (d *memDevice) WriteAt(b []byte, off int64) (int, error) {
	for n := 0; n < len(b); {
		k := min(len(b)-n, blockSize-int(off+int64(n))%blockSize)
		d.blocks++
		if d.onBlock != nil {
			if err := d.onBlock(d.blocks); err != nil {
				return n, err
			}
		}
		copy(d.data[off+int64(n):], b[n:n+k])
		n += k
	}
	return len(b), nil
}

func (d *memDevice) Sync() error {
	if d.syncErr != nil {
		return d.syncErr
	}
	copy(d.durable, d.data)
	return nil
}

// afterPowerFailure returns what a restart could find: of the blocks that were not yet synced, each is old, new, or torn.
func (d *memDevice) afterPowerFailure(r *rand.Rand) *memDevice {
	n := newMemDevice(len(d.data))
	copy(n.data, d.durable)
	for b := 0; b < len(d.data); b += blockSize {
		old, now := d.durable[b:b+blockSize], d.data[b:b+blockSize]
		if bytes.Equal(old, now) {
			continue
		}
		switch r.IntN(4) {
		case 0: // old
		case 1:
			copy(n.data[b:], now)
		case 2:
			copy(n.data[b:], now[:r.IntN(blockSize)])
		case 3:
			for i := range blockSize {
				n.data[b+i] = byte(r.Uint32())
			}
		}
	}
	copy(n.durable, n.data)
	return n
}

func testClock() func() time.Time {
	t := time.Unix(1_700_000_000, 0)
	return func() time.Time { t = t.Add(time.Second); return t }
}

func mustOpen(t *testing.T, d Device, size int, restart uint64) *Journal {
	t.Helper()
	j, err := open(d, int64(size), [16]byte{1, 2, 3}, restart, testClock())
	if err != nil {
		t.Fatalf("open = %v", err)
	}
	return j
}

func kinds(t *testing.T, j *Journal) []string {
	t.Helper()
	var out []string
	for r, err := range j.Records() {
		if err != nil {
			t.Fatalf("Records: %v", err)
		}
		out = append(out, fmt.Sprintf("%d:%s", r.Seq, r.Kind))
	}
	return out
}

func TestAppendReopen(t *testing.T) {
	d := newMemDevice(MinSize)
	j := mustOpen(t, d, MinSize, 7)
	for _, k := range []string{"intent", "store", "outcome"} {
		if _, err := j.Write(k, map[string]string{"of": k}); err != nil {
			t.Fatal(err)
		}
	}
	seq, head := j.Head()
	j = mustOpen(t, d, MinSize, 8)
	if s2, h2 := j.Head(); s2 != seq || h2 != head {
		t.Errorf("Head after reopening = %d %s; want %d %s", s2, h2, seq, head)
	}
	if n, err := j.Write("finding", nil); n != 4 || err != nil {
		t.Errorf("Write after reopening = %d, %v; want 4", n, err)
	}
	if diff := cmp.Diff([]string{"1:intent", "2:store", "3:outcome", "4:finding"}, kinds(t, j)); diff != "" {
		t.Error(diff)
	}
	rep, err := j.Verify()
	if err != nil || rep.Records != 4 || rep.First != 1 || rep.Last != 4 || rep.Restarts != 2 || rep.Lost != 0 {
		t.Errorf("Verify = %+v, %v", rep, err)
	}
	for r, err := range j.From(2) {
		if err != nil || r.Restart != 7 || !json.Valid(r.Data) {
			t.Errorf("From(2) first = %+v, %v; want a record of restart 7 with data", r, err)
		}
		break
	}
}

func TestChanged(t *testing.T) {
	j := mustOpen(t, newMemDevice(MinSize), MinSize, 1)
	c := j.Changed()
	select {
	case <-c:
		t.Fatal("changed before an append")
	default:
	}
	if _, err := j.Write("x", nil); err != nil {
		t.Fatal(err)
	}
	<-c
}

func TestAppendRefuses(t *testing.T) {
	j := mustOpen(t, newMemDevice(MinSize), MinSize, 1)
	if _, err := j.Append(Record{}); err == nil {
		t.Error("Append of a record without kind succeeded")
	}
	if _, err := j.Append(Record{Kind: "x", Data: json.RawMessage("{")}); err == nil {
		t.Error("Append of invalid JSON succeeded")
	}
	if _, err := j.Write("x", strings.Repeat("y", MinSize/3)); err == nil {
		t.Error("Append of a record larger than a quarter of the journal succeeded")
	}
	if n, err := j.Write("x", nil); n != 1 || err != nil {
		t.Errorf("Append after refusals = %d, %v; want 1", n, err)
	}
}

func TestRingDropsOldest(t *testing.T) {
	d := newMemDevice(MinSize)
	j := mustOpen(t, d, MinSize, 1)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 500 {
		if _, err := j.Write("fill", strings.Repeat("z", r.IntN(3000))); err != nil {
			t.Fatal(err)
		}
		rep, err := j.Verify()
		if err != nil || rep.Last != uint64(i+1) || rep.Lost != 0 {
			t.Fatalf("after %d appends Verify = %+v, %v", i+1, rep, err)
		}
		if rep.Records != len(j.held) {
			t.Fatalf("after %d appends %d records on the device; want %d", i+1, rep.Records, len(j.held))
		}
		if j2 := mustOpen(t, d, MinSize, 2); j2.next != j.next || j2.seq != j.seq {
			t.Fatalf("reopened at block %d seq %d; want %d, %d", j2.next, j2.seq, j.next, j.seq)
		}
	}
}

// Power fails after any block of a long series of appends. Every acknowledged record that the ring still owes must be there,
// in an unbroken chain, and the journal must take further records.
func TestPowerFailure(t *testing.T) {
	for seed := range uint64(6) {
		for failAt := 1; failAt < 200; failAt += 1 + int(seed%4)*5 {
			r := rand.New(rand.NewPCG(seed, uint64(failAt)))
			d := newMemDevice(MinSize)
			j := mustOpen(t, d, MinSize, 1)
			d.blocks = 0
			d.onBlock = func(n int) error {
				if n >= failAt {
					return errPower
				}
				return nil
			}
			acked := map[uint64]string{}
			var oldest uint64
			for {
				body := fmt.Sprint(r.Uint64(), strings.Repeat("q", r.IntN(2500)))
				before := uint64(1)
				if len(j.held) > 0 {
					before = j.held[0].seq
				}
				seq, err := j.Write("r", body)
				if err != nil {
					oldest = before
					break
				}
				acked[seq] = body
			}
			d2 := d.afterPowerFailure(r)
			j2 := mustOpen(t, d2, MinSize, 2)
			rep, err := j2.Verify()
			if err != nil {
				t.Fatalf("seed %d block %d: Verify = %v", seed, failAt, err)
			}
			last := uint64(len(acked))
			if rep.Last != last && rep.Last != last+1 {
				t.Fatalf("seed %d block %d: last = %d; want %d or one more", seed, failAt, rep.Last, last)
			}
			if rep.Last == last && rep.Records > 0 && rep.First > oldest+uint64(blocksFor(2600)) {
				t.Fatalf("seed %d block %d: first = %d, oldest held before was %d", seed, failAt, rep.First, oldest)
			}
			for rec, err := range j2.Records() {
				var body string
				if err != nil || json.Unmarshal(rec.Data, &body) != nil {
					t.Fatalf("seed %d block %d: record %d: %v", seed, failAt, rec.Seq, err)
				}
				if want, ok := acked[rec.Seq]; ok && want != body {
					t.Fatalf("seed %d block %d: record %d differs", seed, failAt, rec.Seq)
				}
			}
			for range 70 {
				if _, err := j2.Write("more", nil); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := j2.Verify(); err != nil {
				t.Fatalf("seed %d block %d: after going on: %v", seed, failAt, err)
			}
		}
	}
}

func TestPowerFailureWhileFormatting(t *testing.T) {
	for cut := range blockSize {
		d := newMemDevice(MinSize)
		super := superblock{blocks: minBlocks, id: [16]byte{9}}
		copy(d.data, super.encode()[:cut])
		_, err := open(d, MinSize, [16]byte{1}, 1, testClock())
		// Less than the magic is not recognisably ours: refused rather than overwritten.
		if wantErr := cut > 0 && cut < 8; wantErr != (err != nil) {
			t.Fatalf("open with %d bytes of a superblock = %v", cut, err)
		}
	}
}

func TestFailedAppendIsRetriedInPlace(t *testing.T) {
	d := newMemDevice(MinSize)
	j := mustOpen(t, d, MinSize, 1)
	if _, err := j.Write("a", nil); err != nil {
		t.Fatal(err)
	}
	d.syncErr = errors.New("device error")
	if _, err := j.Write("b", strings.Repeat("b", 2000)); err == nil {
		t.Fatal("Append succeeded although Sync failed")
	}
	d.syncErr = nil
	if n, err := j.Write("c", nil); n != 2 || err != nil {
		t.Fatalf("Append = %d, %v; want 2", n, err)
	}
	j = mustOpen(t, d, MinSize, 2)
	if diff := cmp.Diff([]string{"1:a", "2:c"}, kinds(t, j)); diff != "" {
		t.Error(diff)
	}
}

func TestTampering(t *testing.T) {
	build := func() *memDevice {
		d := newMemDevice(MinSize)
		j := mustOpen(t, d, MinSize, 1)
		for i := range 20 {
			if _, err := j.Write("r", i); err != nil {
				t.Fatal(err)
			}
		}
		return d
	}
	d := build()
	for _, tt := range []struct {
		name string
		do   func(d []byte)
		want string
	}{
		{"a changed byte", func(d []byte) { d[10*blockSize+headerSize+3] ^= 1 }, "record 11 follows on record 9"},
		{"a record taken out", func(d []byte) { clear(d[5*blockSize : 6*blockSize]) }, "record 6 follows on record 4"},
		{"a record replaced with a right hash", func(d []byte) {
			e, err := decode(bytes.NewReader(d), 7, minBlocks)
			if err != nil {
				t.Fatal(err)
			}
			e.payload = []byte(`{"kind":"r","data":99}`)
			copy(d[7*blockSize:], e.encode())
		}, "record 8 does not have the hash"},
		{"a new beginning", func(d []byte) {
			e, err := decode(bytes.NewReader(d), 1, minBlocks)
			if err != nil {
				t.Fatal(err)
			}
			e.prev = digest{}
			copy(d[blockSize:], e.encode())
		}, "record 1 does not follow from the journal's first block"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data := bytes.Clone(d.data)
			tt.do(data)
			_, err := Verify(bytes.NewReader(data), int64(len(data)))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Verify = %v; want %q", err, tt.want)
			}
			// Evidence goes on all the same.
			j := mustOpen(t, &memDevice{data: data, durable: bytes.Clone(data)}, len(data), 3)
			if n, err := j.Write("on", nil); n != 21 || err != nil {
				t.Errorf("Append = %d, %v; want 21", n, err)
			}
		})
	}
}

func TestNotAJournal(t *testing.T) {
	d := newMemDevice(MinSize)
	copy(d.data, "\xebX\x90mkfs.fat")
	want := bytes.Clone(d.data)
	if _, err := Open(d, MinSize); !errors.Is(err, ErrNotJournal) {
		t.Errorf("Open = %v; want ErrNotJournal", err)
	}
	if !bytes.Equal(d.data, want) {
		t.Error("Open changed a device that is no journal")
	}
	d = newMemDevice(MinSize)
	d.data[MinSize-1] = 1
	if _, err := Open(d, MinSize); !errors.Is(err, ErrNotJournal) {
		t.Errorf("Open of a device with data behind a zero block = %v; want ErrNotJournal", err)
	}
	if _, err := Open(d, MinSize-1); err == nil {
		t.Error("Open of too small a device succeeded")
	}
}

func TestOpenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	for i := range 3 {
		j, err := OpenFile(path, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := j.Write("r", i); n != uint64(i+1) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
		if _, err := OpenFile(path, 1<<20); !errors.Is(err, ErrInUse) {
			t.Errorf("OpenFile beside another writer = %v; want ErrInUse", err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	}
	small := filepath.Join(t.TempDir(), "small")
	if _, err := OpenFile(small, MinSize-1); err == nil {
		t.Error("OpenFile made a journal that is too small")
	}
	if _, err := os.Stat(small); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was too small is there: %v", err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if rep, err := Verify(f, 1<<20); err != nil || rep.Records != 3 || rep.Restarts != 3 {
		t.Errorf("Verify = %+v, %v", rep, err)
	}
}

func FuzzVerify(f *testing.F) {
	d := newMemDevice(MinSize)
	j, err := open(d, MinSize, [16]byte{1}, 1, testClock())
	if err != nil {
		f.Fatal(err)
	}
	for i := range 5 {
		if _, err := j.Write("r", strings.Repeat("a", i*300)); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(bytes.Clone(d.data[:8*blockSize]))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		data := make([]byte, MinSize)
		copy(data, b)
		_, _ = Verify(bytes.NewReader(data), MinSize)
		m := &memDevice{data: data, durable: bytes.Clone(data)}
		j, err := open(m, MinSize, [16]byte{1}, 2, testClock())
		if err != nil {
			if j != nil {
				t.Fatal("a journal and an error")
			}
			return
		}
		for range j.Records() {
		}
		if _, err := j.Write("on", "x"); err != nil {
			t.Fatal(err)
		}
		if s, _ := j.Head(); s == 0 {
			t.Fatal("no head after an append")
		}
	})
}

func FuzzDecode(f *testing.F) {
	e := entry{restart: 1, seq: 3, oldest: 1, block: 2, payload: []byte(`{"kind":"x"}`)}
	f.Add(append(make([]byte, 2*blockSize), e.encode()...))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decode(bytes.NewReader(b), 2, 64)
		if (e == nil) == (err == nil) {
			t.Fatalf("decode = %v, %v; want a value or an error", e, err)
		}
		if err == nil {
			if _, err := e.record(); err != nil && errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		}
	})
}
