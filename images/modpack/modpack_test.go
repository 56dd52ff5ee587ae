package modpack

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// module makes the smallest ELF file with a .modinfo section of those tags.
func module(tags ...string) []byte {
	info := []byte(strings.Join(tags, "\x00") + "\x00")
	names := "\x00.modinfo\x00.shstrtab\x00"
	const header, section = 64, 64
	var b bytes.Buffer
	infoAt, namesAt := uint64(header), uint64(header+len(info))
	sections := namesAt + uint64(len(names))
	h := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_AARCH64), Version: 1, Shoff: sections,
		Ehsize: header, Shentsize: section, Shnum: 3, Shstrndx: 2,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	put := func(v any) {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	put(h)
	b.Write(info)
	b.WriteString(names)
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: infoAt, Size: uint64(len(info))})
	put(elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names))})
	return b.Bytes()
}

func compress(t *testing.T, ext string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var err error
	switch ext {
	case "":
		return data
	case ".gz":
		w := gzip.NewWriter(&b)
		_, err = w.Write(data)
		err = errors.Join(err, w.Close())
	case ".xz":
		w, werr := xz.NewWriter(&b)
		if werr != nil {
			t.Fatal(werr)
		}
		_, err = w.Write(data)
		err = errors.Join(err, w.Close())
	case ".zst":
		w, werr := zstd.NewWriter(&b)
		if werr != nil {
			t.Fatal(werr)
		}
		_, err = w.Write(data)
		err = errors.Join(err, w.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tree makes a modules directory.
func tree(t *testing.T, builtin string, modules map[string][]byte) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "6.1.0-test")
	for name, data := range modules {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		_, ext := splitCompression(name)
		if err := os.WriteFile(file, compress(t, ext, data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte(builtin), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func example(t *testing.T) string {
	return tree(t, "kernel/drivers/virtio/virtio.ko\n", map[string][]byte{
		"kernel/drivers/net/virtio_net.ko.xz":          module("depends=virtio-ring,net_failover,virtio", "alias=virtio:d00000001v*"),
		"kernel/drivers/net/net_failover.ko":           module("depends=failover"),
		"kernel/net/core/failover.ko.gz":               module("depends="),
		"kernel/drivers/virtio/virtio_ring.ko.zst":     module("license=GPL"),
		"kernel/fs/ext4/ext4.ko":                       module("alias=fs-ext4", "softdep=pre: crc32c absent", "depends="),
		"kernel/crypto/crc32c_generic.ko":              module("alias=crc32c"),
		"kernel/drivers/a.ko":                          module("softdep=pre: b post: c"),
		"kernel/drivers/b.ko":                          module("softdep=pre: a"),
		"kernel/drivers/c.ko":                          module(),
		"kernel/drivers/broken.ko":                     []byte("no ELF"),
		"kernel/drivers/orphan.ko":                     module("depends=nowhere"),
		"kernel/drivers/loop1.ko":                      module("depends=loop2"),
		"kernel/drivers/loop2.ko":                      module("depends=loop1"),
		"kernel/drivers/modules.order.not-a-module.kx": {},
	})
}

func TestMake(t *testing.T) {
	dir := example(t)
	p, err := Make(dir, []string{"virtio-net", "virtio", "ext4", "crc32c_generic", "a"})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, f := range p.Files() {
		got[f.Name] = string(f.Data)
	}
	wantDep := `kernel/crypto/crc32c_generic.ko:
kernel/drivers/a.ko: kernel/drivers/b.ko
kernel/drivers/b.ko:
kernel/drivers/c.ko:
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/fs/ext4/ext4.ko: kernel/crypto/crc32c_generic.ko
kernel/net/core/failover.ko:
`
	if diff := cmp.Diff(wantDep, got["modules.dep"]); diff != "" {
		t.Errorf("modules.dep (-want +got):\n%s", diff)
	}
	wantAlias := "alias crc32c crc32c_generic\nalias virtio:d00000001v* virtio_net\nalias fs-ext4 ext4\n"
	if diff := cmp.Diff(wantAlias, got["modules.alias"]); diff != "" {
		t.Errorf("modules.alias (-want +got):\n%s", diff)
	}
	if got["modules.builtin"] != "kernel/drivers/virtio/virtio.ko\n" {
		t.Errorf("modules.builtin = %q", got["modules.builtin"])
	}
	for name, data := range got {
		if strings.HasSuffix(name, ".ko") && !strings.HasPrefix(data, "\x7fELF") {
			t.Errorf("%s is not unpacked", name)
		}
	}
	var order []string
	for _, m := range p.LoadOrder() {
		for _, n := range m.Needs {
			if !slices.Contains(order, n) {
				t.Errorf("load order: %s comes before %s, which it needs", m.Name, n)
			}
		}
		order = append(order, m.Name)
	}
	if len(order) != len(p.Modules) {
		t.Errorf("load order has %d of %d modules", len(order), len(p.Modules))
	}
	again, err := Make(dir, []string{"a", "crc32c-generic", "ext4", "virtio_net"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(p.Files(), again.Files()); diff != "" {
		t.Errorf("another order of names gives another pack:\n%s", diff)
	}
}

func TestMakeErrors(t *testing.T) {
	dir := example(t)
	for _, tt := range []struct {
		names []string
		want  string
	}{
		{[]string{"nothing", "virtio", "nowhere"}, "nothing: module not found"},
		{[]string{"broken"}, "not a module"},
		{[]string{"orphan"}, "orphan needs nowhere"},
		{[]string{"loop1"}, "depends on itself"},
	} {
		if _, err := Make(dir, tt.names); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Make(%v) = %v; want %q", tt.names, err, tt.want)
		}
	}
	if _, err := Make(dir, []string{"nothing"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("Make(nothing) = %v; want ErrNotFound", err)
	}
	if _, err := Make(filepath.Join(dir, "none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Make in no directory = %v; want fs.ErrNotExist", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(module("depends=a,b-c", "alias=pci:v*", "softdep=pre: x post: y"))
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Parse(data)
		if err != nil {
			if m.Data != nil {
				t.Fatal("value and error")
			}
			return
		}
		for _, d := range slices.Concat(m.depends, m.softPre, m.softPost) {
			if d == "" || strings.Contains(d, "-") {
				t.Fatalf("dependency %q", d)
			}
		}
	})
}
