package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTypes makes BTF of dwarf2json's file and has a verb read a kernel's memory with it, and with what is of no use there.
func TestTypes(t *testing.T) {
	const from = "../../agent/kernel/isf/testdata/6.1.0-56-cloud-amd64.json.xz"
	out := filepath.Join(t.TempDir(), "6.1.btf")
	if code, stdout, stderr := command(t, "types", from, "-o", out); code != exitOK || !strings.Contains(stdout, "Debian 6.1.192-2") {
		t.Fatalf("exit %d: %s%s", code, stdout, stderr)
	}
	if code, _, stderr := command(t, "types", out); code != exitError || !strings.Contains(stderr, "raw BTF already") {
		t.Errorf("of BTF: exit %d: %s", code, stderr)
	}
	bad := filepath.Join(t.TempDir(), "bad.json")
	if err := os.WriteFile(bad, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	const image = "../../agent/kernel/testdata/6.1.hostmem"
	for _, tt := range []struct {
		types, want string
	}{
		{out, ""}, {from, ""}, {filepath.Dir(out), ""},
		{bad, "dwarf2json"}, {"/nowhere", "no such file"},
	} {
		code, stdout, stderr := command(t, "-types", tt.types, "-image", image, "ps")
		if tt.want == "" && (code != exitOK || !strings.Contains(stdout, "kthreadd")) || tt.want != "" && (code != exitError || !strings.Contains(stderr, tt.want)) {
			t.Errorf("-types %s: exit %d: %s%s", tt.types, code, stdout, stderr)
		}
	}
}
