package attest_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/boot/attest"
)

func TestParseLog(t *testing.T) {
	log := append(image("1.0", "kernel").Events(), attest.TLSEvent(attest.Digest{4}))
	good := marshal(t, log)
	got, err := attest.ParseLog(good)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(log, got); d != "" {
		t.Errorf("a log is another after it was written and read: %s", d)
	}
	if i, ok := got.Image(); !ok || i.PCR() != image("1.0", "kernel").PCR() {
		t.Errorf("Image() = %+v, %v", i, ok)
	}
	if k, ok := got.TLSKey(); !ok || k != (attest.Digest{4}) {
		t.Errorf("TLSKey() = %v, %v", k, ok)
	}
	for n := range good {
		l, err := attest.ParseLog(good[:n])
		if err == nil && len(l) >= len(log) { // where an event ends, a shorter log begins
			t.Fatalf("ParseLog(first %d of %d bytes) = %d events", n, len(good), len(l))
		}
	}
	for _, tt := range []struct {
		name, want string
		at         int
		b          []byte
	}{
		{"no signature", "Spec ID", 32, []byte("x")},
		{"no algorithms", "0 algorithms", 56, []byte{0, 0, 0, 0}},
		{"PCR 24", "no PCR 24", 65, []byte{24}},
		{"many digests", "digests", 73, []byte{9}},
		{"another algorithm", "not among", 77, []byte{4}},
	} {
		b := bytes.Clone(good)
		copy(b[tt.at:], tt.b)
		if _, err := attest.ParseLog(b); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("ParseLog(%s) = %v; want an error with %q", tt.name, err, tt.want)
		}
	}
}

func FuzzParseLog(f *testing.F) {
	l, err := append(image("1.0", "kernel").Events(), attest.TLSEvent(attest.Digest{4})).MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(l)
	f.Fuzz(func(t *testing.T, b []byte) {
		log, err := attest.ParseLog(b)
		if (log == nil) != (err != nil) {
			t.Fatalf("ParseLog() = %v, %v", log, err)
		}
		log.Image()
		log.TLSKey()
		log.Replay(attest.ImagePCR)
		if err != nil {
			return
		}
		again, err := log.MarshalBinary()
		if err != nil {
			return // longer with our header than with theirs
		}
		if second, err := attest.ParseLog(again); err != nil || !cmp.Equal(log, second) {
			t.Fatalf("the log is another after it was written and read: %v", err)
		}
	})
}

func FuzzParseQuote(f *testing.F) {
	// A quote by swtpm.
	seed, err := hex.DecodeString(goldenQuote)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := attest.ParseQuote(b)
		if err != nil {
			return
		}
		if again, err := q.MarshalBinary(); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("the quote is another after it was read and written: %v", err)
		}
	})
}

func FuzzParseSealed(f *testing.F) {
	f.Add([]byte(`{"version":1,"public":"","private":"","pcrs":["` + strings.Repeat("0", 64) + `"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := attest.ParseSealed(b); err == nil && len(s.PCRs) == 0 {
			t.Fatal("sealed to nothing")
		}
	})
}

func FuzzParseSelection(f *testing.F) {
	f.Add(attest.Selection(attest.ImagePCR, attest.IdentityPCR))
	f.Fuzz(func(t *testing.T, b []byte) {
		pcrs, err := attest.ParseSelection(b)
		if (len(pcrs) == 0) != (err != nil) {
			t.Fatalf("ParseSelection() = %v, %v", pcrs, err)
		}
		if err != nil {
			return
		}
		again, err := attest.ParseSelection(attest.Selection(pcrs...))
		if err != nil || !cmp.Equal(pcrs, again) {
			t.Fatalf("ParseSelection() = %v, and then %v, %v", pcrs, again, err)
		}
	})
}
