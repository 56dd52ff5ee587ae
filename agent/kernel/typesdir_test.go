package kernel

import (
	"os"
	"path/filepath"
	"testing"
)

func TestTypesDir(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "types")
	if raw, err := TypesDir(dir)(Build{Release: "6.1"}); raw != nil || err != nil {
		t.Errorf("no directory: %q, %v", raw, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"types/6.1.btf": "release", "types/abcd.btf": "ID", "secret.btf": "outside"} {
		if err := os.WriteFile(filepath.Join(top, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		build Build
		want  string
		fails bool
	}{
		{Build{Release: "6.1"}, "release", false},
		{Build{Release: "6.1", ID: "abcd"}, "ID", false},
		{Build{Release: "6.1", ID: "none"}, "release", false},
		{Build{Release: "6.2"}, "", false},
		{Build{}, "", false},
		{Build{Release: "../secret"}, "", true}, // the name is the host's word
	} {
		raw, err := TypesDir(dir)(tt.build)
		if string(raw) != tt.want || (err != nil) != tt.fails {
			t.Errorf("%+v: %q, %v; want %q", tt.build, raw, err, tt.want)
		}
	}
}
