package kernel

import "iter"

// Key is a key or keyring that the kernel keeps (struct key, include/linux/key.h): its name, not what it holds.
type Key struct {
	Addr        VirtAddr `json:"addr"`
	Serial      uint32   `json:"serial"`
	Type        string   `json:"type"` // keyring, user, logon, asymmetric, …
	Description string   `json:"description"`
	UID         uint32   `json:"uid"`
	GID         uint32   `json:"gid"`
	Perm        uint32   `json:"perm"`
}

const maxKeys = 1 << 18

// Keys lists all keys and keyrings by their serial numbers.
func (v *View) Keys() iter.Seq2[Key, error] {
	return settled(v, "walk keys", func() ([]Key, error) {
		r := resolver{img: v.img}
		root := r.symbol("key_serial_tree")
		s := r.shape("key", "serial", "uid", "gid", "perm", "type", "description")
		node := r.field("key", 0, "serial_node")
		typ := r.shape("key_type", "name")
		if r.err != nil {
			return nil, r.err
		}
		var all []Key
		err := v.rbtree("key", root, node, maxKeys, func(at VirtAddr) error {
			t, err := v.thing(s, at)
			if err != nil {
				return err
			}
			k := Key{Addr: at, Serial: uint32(t.num("serial")), UID: uint32(t.num("uid")), GID: uint32(t.num("gid")), Perm: uint32(t.num("perm"))}
			if n := len(all); n > 0 && int32(all[n-1].Serial) >= int32(k.Serial) {
				return t.corrupt("key %#x after %#x", k.Serial, all[n-1].Serial)
			}
			of, err := v.thing(typ, t.ptr("type"))
			if err != nil {
				return err
			}
			if k.Type, err = v.cstring("key_type", of.ptr("name"), 64); err != nil {
				return err
			}
			if p := t.ptr("description"); p != 0 {
				if k.Description, err = v.cstring("key", p, 4096); err != nil {
					return err
				}
			}
			all = append(all, k)
			return nil
		})
		return all, err
	})
}
