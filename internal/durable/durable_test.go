package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func names(t *testing.T, dir string) []string {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var n []string
	for _, e := range all {
		n = append(n, e.Name())
	}
	return n
}

func TestWriteFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "a")
	for _, c := range []struct {
		data string
		perm fs.FileMode
	}{{"old", 0o600}, {"new and longer", 0o644}, {"", 0o400}} {
		if err := WriteFile(name, []byte(c.data), c.perm); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(name)
		if err != nil || string(b) != c.data {
			t.Errorf("content %q, %v; want %q", b, err, c.data)
		}
		if st, err := os.Stat(name); err != nil || st.Mode() != c.perm {
			t.Errorf("mode %v, %v; want %v", st.Mode(), err, c.perm)
		}
	}
	if n := names(t, filepath.Dir(name)); len(n) != 1 {
		t.Errorf("the folder holds %q, want the file alone", n)
	}
}

// TestFailedWrite: the old content stays, nothing is left over, and who reads meanwhile sees the old.
func TestFailedWrite(t *testing.T) {
	name := filepath.Join(t.TempDir(), "a")
	if err := WriteFile(name, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	full := errors.New("no space")
	err := Write(name, 0o600, func(f *os.File) error {
		if _, err := f.WriteString("half"); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile(name); err != nil || string(b) != "old" {
			t.Errorf("while it is written, a reader sees %q, %v", b, err)
		}
		return full
	})
	if !errors.Is(err, full) {
		t.Errorf("Write = %v, want the writer's error", err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "old" {
		t.Errorf("after a failure the file holds %q, %v", b, err)
	}
	if n := names(t, filepath.Dir(name)); len(n) != 1 {
		t.Errorf("the folder holds %q, want the file alone", n)
	}
	if err := WriteFile(filepath.Join(filepath.Dir(name), "none", "a"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a folder that is not there: %v", err)
	}
}
