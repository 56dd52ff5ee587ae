//go:build linux

package uverbs

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// TestFind looks for GIDs in a tree as sysfs has it; what the kernel does with the commands, tests/rxe tries in guests.
func TestFind(t *testing.T) {
	root := t.TempDir()
	for path, content := range map[string]string{
		"infiniband_verbs/abi_version":                "6\n",
		"infiniband_verbs/uverbs0/ibdev":              "mlx5_0\n",
		"infiniband_verbs/uverbs1/ibdev":              "rxe0\n",
		"infiniband/mlx5_0/ports/1/gids/0":            "fe80:0000:0000:0000:5054:00ff:fe00:0001\n",
		"infiniband/mlx5_0/ports/1/gid_attrs/types/0": "IB/RoCE v1\n",
		"infiniband/mlx5_0/ports/2/gids/3":            "0000:0000:0000:0000:0000:ffff:0a09:0001\n",
		"infiniband/mlx5_0/ports/2/gid_attrs/types/3": "RoCE v2\n",
		"infiniband/mlx5_0/ports/2/gids/4":            "fd00:0000:0000:0000:0000:0000:0000:0001\n",
		"infiniband/mlx5_0/ports/2/gids/not-a-number": "fd00:0000:0000:0000:0000:0000:0000:0009\n",
		"infiniband/rxe0/ports/1/gids/0":              "fe80:0000:0000:0000:5054:00ff:fe00:0002\n",
		"infiniband/rxe0/ports/1/gids/1":              "0000:0000:0000:0000:0000:ffff:0a09:0002\n",
		"infiniband/rxe0/ports/1/gids/2":              "rubbish\n",
		"infiniband/rxe0/ports/1/gid_attrs/types/0":   "RoCE v2\n",
		"infiniband/rxe0/ports/1/gid_attrs/types/1":   "RoCE v2\n",
		"infiniband/rxe0/ports/1/gid_attrs/types/2":   "RoCE v2\n",
		"infiniband_verbs/uverbs2/ibdev":              "gone0\n",
	} {
		p := filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		addr, node, name string
		port, gid        uint8
	}{
		{"10.9.0.1", "uverbs0", "mlx5_0", 2, 3},
		{"10.9.0.2", "uverbs1", "rxe0", 1, 1},
		{"fe80::5054:ff:fe00:2", "uverbs1", "rxe0", 1, 0},
		{"fe80::5054:ff:fe00:1", "", "", 0, 0}, // RoCE v1
		{"fd00::1", "", "", 0, 0},              // no type: not in use
		{"10.9.0.3", "", "", 0, 0},
	} {
		d := &Device{addr: netip.MustParseAddr(tt.addr)}
		node, err := d.find(filepath.Join(root, "infiniband_verbs"))
		if node != tt.node || d.name != tt.name || d.port != tt.port || d.gid != tt.gid || (tt.node == "") != errors.Is(err, ErrNoDevice) {
			t.Errorf("find(%s) = %q, %v: %q port %d GID %d; want %+v", tt.addr, node, err, d.name, d.port, d.gid, tt)
		}
	}
}

// TestClosed: what has been closed says so, and nothing crashes.
func TestClosed(t *testing.T) {
	d := &Device{fd: -1, async: -1}
	if _, err := d.NewPD(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("NewPD: %v", err)
	}
	pd := &PD{d: d}
	for _, cfg := range []roce.MRConfig{{}, {Length: 9}, {Length: 8, Offset: 1}, {Length: 1, Offset: -1}, {Length: 1 << 63, Offset: 8}, {Addr: 1<<64 - 1, Length: 8}} {
		if _, err := pd.Register(roce.NewBuffer(8), cfg); err == nil {
			t.Errorf("registered %+v of 8 bytes", cfg)
		}
	}
	if _, err := d.NewQP(pd, roce.QPConfig{PathMTU: 1500}); err == nil {
		t.Error("made a queue pair with a path MTU of 1500")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
