package journal

import (
	"bytes"
	"os"
	"testing"
)

// Version 1 of the format, byte for byte. Do not change this test: journals of that form are in the field. A new version of
// the format gets a test of its own.
func TestGoldenV1(t *testing.T) {
	d := newMemDevice(MinSize)
	j := mustOpen(t, d, MinSize, 0x1122334455667788)
	for _, r := range []struct {
		kind string
		data any
	}{
		{"open", map[string]int{"version": 1}},
		{"intent", map[string]string{"action": "kill-process"}},
		{"store", map[string]string{"old": "00", "new": "ff"}},
	} {
		if _, err := j.Write(r.kind, r.data); err != nil {
			t.Fatal(err)
		}
	}
	got := d.data[:5*blockSize]
	const golden = "testdata/v1.journal"
	if os.Getenv("UPDATE_GOLDEN") == "new" {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the bytes of version 1 have changed")
	}
	whole := make([]byte, MinSize)
	copy(whole, want)
	rep, err := Verify(bytes.NewReader(whole), MinSize)
	if err != nil || rep.Records != 3 || rep.Head != "ea343a03e661c8190f805ea2615fb2a557321adcc7d127d9ea40cb73608bcbf6" {
		t.Errorf("Verify = %+v, %v", rep, err)
	}
}
