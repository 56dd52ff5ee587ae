package kernel

import (
	"encoding/hex"
	"fmt"
	"time"

	"github.com/cilium/ebpf/btf"
)

// BPF is what eBPF has been loaded into the kernel (kernel/bpf/syscall.c).
type BPF struct {
	Programs []BPFProgram `json:"programs"`
	Maps     []BPFMap     `json:"maps"`
	Links    []BPFLink    `json:"links"`
}

// BPFProgram is a program (struct bpf_prog).
type BPFProgram struct {
	Addr   VirtAddr      `json:"addr"`
	ID     uint32        `json:"id"`
	Type   string        `json:"type"` // BPF_PROG_TYPE_… in small letters
	Name   string        `json:"name"`
	Tag    string        `json:"tag"`
	Insns  int           `json:"insns"`  // instructions of eBPF
	Jited  int           `json:"jited"`  // bytes of machine code; zero if it is interpreted
	Entry  VirtAddr      `json:"entry"`  // where it begins
	Loaded time.Duration `json:"loaded"` // since boot
	UID    uint32        `json:"uid"`    // of who loaded it
	Maps   []uint32      `json:"maps"`   // IDs
}

// BPFMap is a map (struct bpf_map).
type BPFMap struct {
	Addr       VirtAddr `json:"addr"`
	ID         uint32   `json:"id"`
	Type       string   `json:"type"` // BPF_MAP_TYPE_… in small letters
	Name       string   `json:"name"`
	KeySize    int      `json:"keySize"`
	ValueSize  int      `json:"valueSize"`
	MaxEntries int      `json:"maxEntries"`
	Flags      uint32   `json:"flags"`
}

// BPFLink is what ties a program to where it runs (struct bpf_link).
type BPFLink struct {
	Addr    VirtAddr `json:"addr"`
	ID      uint32   `json:"id"`
	Type    string   `json:"type"`    // BPF_LINK_TYPE_… in small letters
	Program uint32   `json:"program"` // ID
}

const (
	maxBPF     = 1 << 18
	maxBPFMaps = 1 << 10 // of a program
)

// enumerators returns the names of an enum by their values, the shortest where several are alike.
func (v *View) enumerators(typ, prefix string) map[uint64]string {
	names := make(map[uint64]string)
	found, err := v.img.types.named(typ)
	if err != nil {
		return names
	}
	for _, t := range found {
		e, ok := btf.UnderlyingType(t).(*btf.Enum)
		if !ok {
			continue
		}
		for _, x := range e.Values {
			if len(x.Name) > len(prefix) && x.Name[:len(prefix)] == prefix && names[x.Value] == "" {
				names[x.Value] = lowerName(x.Name, prefix)
			}
		}
	}
	return names
}

// BPF lists the eBPF programs, maps and links.
func (v *View) BPF() (BPF, error) {
	b, err := settle(v, v.bpf)
	if err != nil {
		return b, fmt.Errorf("walk eBPF: %w", err)
	}
	return b, nil
}

func (v *View) bpf() (BPF, error) {
	b := BPF{Programs: []BPFProgram{}, Maps: []BPFMap{}, Links: []BPFLink{}}
	r := resolver{img: v.img}
	tree := VirtAddr(r.field("idr", 0, "idr_rt"))
	programs, maps, links := r.symbol("prog_idr")+tree, r.symbol("map_idr")+tree, r.symbol("link_idr")+tree
	prog := r.shape("bpf_prog", "jited", "type", "len", "jited_len", "tag[]", "bpf_func", "aux")
	aux := r.shape("bpf_prog_aux", "id", "name[]", "load_time", "used_map_cnt", "used_maps", "user")
	user := r.shape("user_struct", "uid")
	bpfMap := r.shape("bpf_map", "map_type", "key_size", "value_size", "max_entries", "map_flags", "id", "name[]")
	link := r.shape("bpf_link", "id", "type", "prog")
	if r.err != nil {
		return b, r.err
	}
	programTypes, mapTypes, linkTypes := v.enumerators("bpf_prog_type", "BPF_PROG_TYPE_"), v.enumerators("bpf_map_type", "BPF_MAP_TYPE_"), v.enumerators("bpf_link_type", "BPF_LINK_TYPE_")
	kind := func(names map[uint64]string, n uint64) string {
		if names[n] == "" {
			return fmt.Sprint(n)
		}
		return names[n]
	}
	err := v.xarray("bpf_prog", programs, maxBPF, func(id uint64, at VirtAddr) error {
		t, err := v.thing(prog, at)
		if err != nil {
			return err
		}
		a, err := v.thing(aux, t.ptr("aux"))
		if err != nil {
			return err
		}
		p := BPFProgram{Addr: at, ID: uint32(a.num("id")), Type: kind(programTypes, t.num("type")), Name: a.text("name"), Tag: hex.EncodeToString(t.bytes("tag")),
			Insns: t.int("len"), Entry: t.ptr("bpf_func"), Loaded: time.Duration(a.num("load_time")), Maps: []uint32{}}
		if t.num("jited") != 0 {
			p.Jited = t.int("jited_len")
		}
		if n := a.num("used_map_cnt"); uint64(p.ID) != id || n > maxBPFMaps {
			return t.corrupt("program %d is listed as %d, uses %d maps", p.ID, id, n)
		} else if n > 0 {
			used, err := v.pointers("used_maps", a.ptr("used_maps"), int(n))
			if err != nil {
				return err
			}
			for _, m := range used {
				x, err := v.thing(bpfMap, m)
				if err != nil {
					return err
				}
				p.Maps = append(p.Maps, uint32(x.num("id")))
			}
		}
		if u := a.ptr("user"); u != 0 {
			x, err := v.thing(user, u)
			if err != nil {
				return err
			}
			p.UID = uint32(x.num("uid"))
		}
		b.Programs = append(b.Programs, p)
		return nil
	})
	if err != nil {
		return b, err
	}
	err = v.xarray("bpf_map", maps, maxBPF, func(id uint64, at VirtAddr) error {
		t, err := v.thing(bpfMap, at)
		if err != nil {
			return err
		}
		m := BPFMap{Addr: at, ID: uint32(t.num("id")), Type: kind(mapTypes, t.num("map_type")), Name: t.text("name"), KeySize: t.int("key_size"),
			ValueSize: t.int("value_size"), MaxEntries: int(t.num("max_entries")), Flags: uint32(t.num("map_flags"))}
		if uint64(m.ID) != id {
			return t.corrupt("map %d is listed as %d", m.ID, id)
		}
		b.Maps = append(b.Maps, m)
		return nil
	})
	if err != nil {
		return b, err
	}
	err = v.xarray("bpf_link", links, maxBPF, func(id uint64, at VirtAddr) error {
		t, err := v.thing(link, at)
		if err != nil {
			return err
		}
		l := BPFLink{Addr: at, ID: uint32(t.num("id")), Type: kind(linkTypes, t.num("type"))}
		if uint64(l.ID) != id {
			return t.corrupt("link %d is listed as %d", l.ID, id)
		}
		if p := t.ptr("prog"); p != 0 {
			x, err := v.thing(prog, p)
			if err != nil {
				return err
			}
			a, err := v.thing(aux, x.ptr("aux"))
			if err != nil {
				return err
			}
			l.Program = uint32(a.num("id"))
		}
		b.Links = append(b.Links, l)
		return nil
	})
	return b, err
}
