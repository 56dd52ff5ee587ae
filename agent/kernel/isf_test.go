package kernel

import (
	"errors"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel/isf"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// TestTypesElsewhere takes the BTF from a recorded kernel and gives the types that dwarf2json found in the debug information of the
// same build: every answer must be what it was.
func TestTypesElsewhere(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		if name != "6.1" {
			return
		}
		file, err := os.Open("isf/testdata/6.1.0-56-cloud-amd64.json.xz")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		types, err := isf.Read(file)
		if err != nil {
			t.Fatal(err)
		}
		own, mem := openRecorded(t, rec)
		start, err := own.Symbol("__start_BTF")
		if err != nil {
			t.Fatal(err)
		}
		pa, _, err := own.space.translate(direct{t.Context(), mem}, start)
		if err != nil {
			t.Fatal(err)
		}
		without := pruned{Memory: mem, parts: []hostmem.Segment{{Addr: pa, Buf: make([]byte, 64)}}}
		note, err := strconv.ParseUint(rec.Labels()["note"], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		o := Options{Hint: Hint{Note: hostmem.PhysAddr(note)}, NoteOnly: true, Cache: new(Cache)}
		attach := func() (*Image, error) { return Open(t.Context(), without, o) }

		var corrupt *CorruptError
		if _, err := attach(); !errors.As(err, &corrupt) {
			t.Fatalf("without BTF: %v", err)
		}
		o.Types = func(Build) ([]byte, error) { return nil, nil }
		if _, err := attach(); !errors.As(err, &corrupt) {
			t.Fatalf("with no types of it: %v", err)
		}
		o.Types = func(Build) ([]byte, error) { return append(types.BTF[:len(types.BTF)/2:len(types.BTF)/2], 0), nil }
		if _, err := attach(); !errors.Is(err, errBadTypes) {
			t.Fatalf("with half a file: %v", err)
		}
		var asked Build
		o.Types = func(b Build) ([]byte, error) { asked = b; return append([]byte(nil), types.BTF...), nil }
		for _, from := range []string{"made elsewhere: ", "known from before"} {
			img, err := attach()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range img.Info().Rungs {
				if r.Name == "btf" && !strings.Contains(r.Detail, from) {
					t.Errorf("the rung of types says %q, want %q", r.Detail, from)
				}
			}
			if want := own.Info(); asked != (Build{want.Release, want.BuildID, want.Banner}) || asked.Banner != types.Banner {
				t.Errorf("asked for %+v", asked)
			}
			for _, l := range listings {
				want, werr := l.ask(own.View(t.Context()))
				got, gerr := l.ask(img.View(t.Context()))
				if !reflect.DeepEqual(got, want) || (gerr == nil) != (werr == nil) {
					t.Errorf("%s: %v, %v; by the kernel's own types %v, %v", l.name, got, gerr, want, werr)
				}
			}
		}
	})
}
