package hostmem_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const page = hostmem.PageSize

func TestOpenRAMFileErrors(t *testing.T) {
	dir := t.TempDir()
	ram := writeFile(t, filepath.Join(dir, "ram"), make([]byte, 4*page))
	empty := writeFile(t, filepath.Join(dir, "empty"), nil)
	for _, c := range []struct {
		path   string
		layout []hostmem.Extent
		want   string
	}{
		{filepath.Join(dir, "none"), nil, "no such file"},
		{dir, nil, "not a regular file"},
		{empty, nil, "is empty"},
		{ram, []hostmem.Extent{}, "has no memory"},
		{ram, hostmem.Q35Layout(1 << 30), "holds 16384 bytes and its layout needs 1073741824"},
		{ram, []hostmem.Extent{{hostmem.Range{0, page}, 0}, {hostmem.Range{page - 1, page}, page}}, "overlaps"},
		{ram, []hostmem.Extent{{hostmem.Range{0, page}, 4}}, "shifts 8-byte words"},
		{ram, []hostmem.Extent{{hostmem.Range{0, page}, -page}}, "out of range"},
		{ram, []hostmem.Extent{{hostmem.Range{^hostmem.PhysAddr(0), page}, 0}}, "out of range"},
	} {
		mem, err := hostmem.OpenRAMFile(c.path, c.layout, false)
		if err == nil {
			mem.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("OpenRAMFile(%s, %v) = %v; want %q", filepath.Base(c.path), c.layout, err, c.want)
		}
	}
}

// Reads must not make a sparse file grow: on tmpfs a load from a hole allocates a page.
func TestRAMFileIsReadWithoutFillingHoles(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "hostmem")
	if err != nil {
		t.Skipf("no tmpfs to test on: %v", err)
	}
	defer os.RemoveAll(dir)
	path := writeFile(t, filepath.Join(dir, "ram"), nil)
	const size = 16 << 20
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	mem, err := hostmem.OpenRAMFile(path, []hostmem.Extent{
		{hostmem.Range{0, size / 2}, 0},
		{hostmem.Range{1 << 32, size / 2}, size / 2},
	}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if got := mem.Resident(); len(got) != 0 {
		t.Errorf("Resident() of an untouched file = %v", got)
	}
	const touched = 1<<32 + 5*page
	if _, err := mem.WriteAt([]byte{1}, touched); err != nil {
		t.Fatal(err)
	}
	if _, err := mem.WriteAt([]byte{1}, 2*page+7); err != nil {
		t.Fatal(err)
	}
	for _, r := range mem.Map() {
		for off := uint64(0); off < r.Size; off += 1 << 20 {
			if _, err := mem.ReadAt(make([]byte, 1<<20), int64(uint64(r.Start)+off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := []hostmem.Range{{2 * page, page}, {touched, page}}
	if got := mem.Resident(); !slices.Equal(got, want) {
		t.Errorf("Resident() after a scan = %v; want %v", got, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Blocks*512 != 2*page {
		t.Errorf("the file holds %d bytes after a scan, %v; want %d", st.Blocks*512, err, 2*page)
	}
}

// A machine whose RAM file is cut under the agent is a lost link, not a crash of the agent.
func TestRAMFileThatShrinks(t *testing.T) {
	path := writeFile(t, filepath.Join(t.TempDir(), "ram"), make([]byte, 64*page))
	mem, err := hostmem.OpenRAMFile(path, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := os.Truncate(path, 2*page); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{64, 8 * page, 60 * page} {
		k, err := mem.ReadAt(make([]byte, n), 2*page-16)
		if fault, ok := errors.AsType[*hostmem.FaultError](err); !ok || k != 16 || fault.Addr != 2*page || fault.Len != n-16 || !errors.Is(err, hostmem.ErrLinkDown) {
			t.Errorf("ReadAt(%d bytes) across the new end = %d, %v; want 16 bytes and %v at %#x", n, k, err, hostmem.ErrLinkDown, 2*page)
		}
	}
	if _, err := mem.WriteAt([]byte{1}, 3*page); !errors.Is(err, hostmem.ErrLinkDown) {
		t.Errorf("WriteAt behind the new end = %v; want %v", err, hostmem.ErrLinkDown)
	}
	if _, err := mem.CompareAndSwap(3*page, 0, 1); !errors.Is(err, hostmem.ErrLinkDown) {
		t.Errorf("CompareAndSwap behind the new end = %v; want %v", err, hostmem.ErrLinkDown)
	}
	if _, err := mem.ReadAt(make([]byte, page), 0); err != nil {
		t.Errorf("ReadAt in front of the new end = %v", err)
	}
}

func TestRAMFileBeyondTheAddressSpace(t *testing.T) {
	if strconv.IntSize > 32 {
		t.Skip("a 64-bit agent maps whatever a host has; this is about GOARCH=arm")
	}
	path := writeFile(t, filepath.Join(t.TempDir(), "ram"), nil)
	if err := os.Truncate(path, 3<<30); err != nil {
		t.Fatal(err)
	}
	if _, err := hostmem.OpenRAMFile(path, nil, false); err == nil || !strings.Contains(err.Error(), "3072 MiB do not fit into the address space") {
		t.Errorf("OpenRAMFile(3 GiB) = %v; want a clear error", err)
	}
}

func TestReadOnlyRAMFile(t *testing.T) {
	mem := ramFile(t, false)
	if _, err := mem.WriteAt([]byte{1}, 0x1000); !errors.Is(err, hostmem.ErrReadOnly) {
		t.Errorf("WriteAt = %v; want %v", err, hostmem.ErrReadOnly)
	}
	if _, err := mem.CompareAndSwap(0x1000, 0, 1); !errors.Is(err, hostmem.ErrReadOnly) {
		t.Errorf("CompareAndSwap = %v; want %v", err, hostmem.ErrReadOnly)
	}
}
