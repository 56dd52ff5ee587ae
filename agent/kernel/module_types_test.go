package kernel

import (
	"encoding/binary"
	"errors"
	"testing"
)

// madeBTF makes a BTF of types and strings.
func madeBTF(types []uint32, strings string) []byte {
	var b []byte
	for _, w := range []uint32{0x1eb9f, btfHeaderLen, 0, uint32(4 * len(types)), uint32(4 * len(types)), uint32(len(strings))} {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	for _, w := range types {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return append(b, strings...)
}

// splitBTF is a kernel's BTF of one int, and a module's, which has a structure of two of them: its type is number 2, and its
// strings begin behind those of the kernel.
func splitBTF() (base, split []byte, strings uint64) {
	names := "\x00int\x00"
	base = madeBTF([]uint32{1, btfInt << 24, 4, 1<<24 | 32}, names)
	n := uint32(len(names))
	split = madeBTF([]uint32{n, btfStruct<<24 | 2, 8, n + 7, 1, 0, n + 9, 1, 32}, "driver\x00a\x00b\x00")
	return base, split, uint64(n)
}

func TestJoinBTF(t *testing.T) {
	base, split, strings := splitBTF()
	joined, err := joinBTF(base, split, strings)
	if err != nil {
		t.Fatal(err)
	}
	types, err := newTypes(joined)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := types.field("driver", "b"); err != nil || f.Offset != 4 || f.Size != 4 {
		t.Errorf("driver.b = %+v, %v", f, err)
	}
	if n, err := types.sizeof("int"); err != nil || n != 4 {
		t.Errorf("int is of %d bytes, %v", n, err)
	}
	if _, err := joinBTF(base, split, strings+1); err == nil {
		t.Error("strings that do not go on where the kernel's end are believed")
	}
	for n := range split {
		if _, err := joinBTF(base, split[:n], strings); err == nil {
			t.Errorf("%d of %d bytes are believed", n, len(split))
		}
	}
}

func FuzzJoinBTF(f *testing.F) {
	base, split, strings := splitBTF()
	f.Add(split)
	f.Fuzz(func(t *testing.T, split []byte) {
		joined, err := joinBTF(base, split, strings)
		if err != nil {
			return
		}
		types, err := newTypes(joined)
		if err != nil {
			return
		}
		if _, err := types.field("driver", "b"); err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrAmbiguous) {
			t.Log(err)
		}
	})
}

// testModuleTypes reads the driver's private part of a network interface, whose type only the driver's module knows: it points
// back to the interface.
func testModuleTypes(t *testing.T, g *guest, img *Image) {
	v := g.frozenView(img)
	var eth Interface
	for _, i := range gather(t, v, v.Interfaces()) {
		if i.Name == "eth0" {
			eth = i
		}
	}
	f, err := v.ModuleField("virtio_net", "virtnet_info", "dev")
	if _, e := img.Symbol("btf_modules"); e != nil { // before v5.11, or a kernel that does not name it
		if !errors.Is(err, ErrNotSupported) {
			t.Errorf("ModuleField = %+v, %v; want ErrNotSupported", f, err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	priv := uint64(0)
	if p, err := img.Field("net_device", "priv"); err == nil {
		priv = p.Offset
	} else if n, err := img.Sizeof("net_device"); err == nil {
		priv = alignUp(n, 32) // NETDEV_ALIGN
	}
	at := eth.Addr + VirtAddr(priv)
	if dev, err := v.Uint64(at + VirtAddr(f.Offset)); err != nil || VirtAddr(dev) != eth.Addr || f.Size != 8 {
		t.Errorf("virtnet_info.dev (%+v) of eth0 at %v is %#x, %v", f, eth.Addr, dev, err)
	}
	if val, err := v.Print("virtio_net:virtnet_info", at); err != nil || len(val.Parts) < 10 {
		t.Errorf("print virtnet_info: %d members, %v", len(val.Parts), err)
	}
	if _, err := v.ModuleField("no_such_module", "a", "b"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a module that is not there: %v", err)
	}
}
