package initramfs

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
)

func TestArchiveIsReproducible(t *testing.T) {
	add := []func(*Archive){
		func(a *Archive) { a.File("bbin/tool", []byte("tool"), 0o755) },
		func(a *Archive) { a.Symlink("bbin/uinit", "tool") },
		func(a *Archive) { a.Directory("bbin", 0o700) },
		func(a *Archive) { a.CharDevice("dev/console", 0o600, 5, 1) },
		func(a *Archive) { a.File("/etc/../etc/conf", nil, 0o644) },
	}
	var first []byte
	for range 10 {
		rand.Shuffle(len(add), func(i, j int) { add[i], add[j] = add[j], add[i] })
		var a Archive
		for _, f := range add {
			f(&a)
		}
		b, err := a.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = b
		}
		if !bytes.Equal(first, b) {
			t.Fatal("the order in which entries are added changes the archive")
		}
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(first)))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range records {
		names = append(names, r.Name)
		if r.Name == "bbin" && r.Mode&0o777 != 0o700 {
			t.Errorf("bbin has mode %o; want the one that was asked for", r.Mode)
		}
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 || r.Ino != 0 {
			t.Errorf("%s is not normalised: %v", r.Name, r.Info)
		}
	}
	if diff := cmp.Diff([]string{"bbin", "bbin/tool", "bbin/uinit", "dev", "dev/console", "etc", "etc/conf"}, names); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
}

func TestArchiveErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		add  func(*Archive)
		want string
	}{
		{"twice", func(a *Archive) { a.File("a", nil, 0o644); a.Symlink("a", "b") }, "a is there twice"},
		{"two modes", func(a *Archive) { a.Directory("a", 0o755); a.File("a/b", nil, 0o644); a.Directory("a", 0o700) }, "a is there twice"},
		{"below a file", func(a *Archive) { a.File("a", nil, 0o644); a.File("a/b", nil, 0o644) }, "which is no directory"},
	} {
		var a Archive
		tt.add(&a)
		if _, err := a.Bytes(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Bytes() = %v; want %q", tt.name, err, tt.want)
		}
	}
	var a Archive
	if err := a.Append([]byte("not an archive")); err == nil {
		t.Error("Append of no archive: no error")
	}
}

func TestCompress(t *testing.T) {
	data := bytes.Repeat([]byte("the quick brown fox "), 200_000)
	for _, e := range []Effort{Quick, Thorough} {
		a, err := Compress(data, e)
		if err != nil {
			t.Fatal(err)
		}
		b, err := Compress(data, e)
		if err != nil || !bytes.Equal(a, b) {
			t.Errorf("effort %d: compressed twice, two results (%v)", e, err)
		}
		var h zstd.Header
		if err := h.Decode(a); err != nil || h.WindowSize > 8<<20 {
			t.Errorf("effort %d: window %d, %v; want 8 MiB at most", e, h.WindowSize, err)
		}
		r, err := zstd.NewReader(nil)
		if err != nil {
			t.Fatal(err)
		}
		// Two frames in a row are what the kernel gets.
		back, err := r.DecodeAll(append(a, b...), nil)
		r.Close()
		if err != nil || !bytes.Equal(back, append(bytes.Clone(data), data...)) {
			t.Errorf("effort %d: does not unpack to what went in: %v", e, err)
		}
	}
}
