package kernel

import "fmt"

const (
	maxLivePatches = 1 << 10
	maxLiveFuncs   = 1 << 14
	maxPatchName   = 512 // KSYM_NAME_LEN
)

// livePatches lists the functions that live patches replace (struct klp_patch, include/linux/livepatch.h; its lists since v5.1).
// Disabled are those that the transition has not reached or has left, kernel/livepatch/transition.c.
func (v *View) livePatches() ([]Probe, error) {
	head, ok, err := v.feature("klp_patches")
	if !ok {
		return nil, err
	}
	r := resolver{img: v.img}
	patch := r.shape("klp_patch", "list[]", "obj_list[]", "enabled")
	object := r.shape("klp_object", "node[]", "func_list[]", "name", "patched")
	function := r.shape("klp_func", "node[]", "old_name", "new_func", "patched", "nop")
	if r.err != nil {
		return nil, r.err
	}
	var all []Probe
	err = v.list("klp_patch", head, patch.offset("list"), maxLivePatches, func(at VirtAddr) error {
		p, err := v.thing(patch, at)
		if err != nil {
			return err
		}
		return v.list("klp_object", p.at("obj_list"), object.offset("node"), maxModules, func(at VirtAddr) error {
			o, err := v.thing(object, at)
			if err != nil {
				return err
			}
			of := ""
			if o.ptr("name") != 0 { // else it is the kernel itself
				if of, err = v.cstring("klp_object", o.ptr("name"), 64); err != nil {
					return err
				}
				of = " [" + of + "]"
			}
			return v.list("klp_func", o.at("func_list"), function.offset("node"), maxLiveFuncs, func(at VirtAddr) error {
				if len(all) == maxProbes {
					return &CorruptError{"klp_func", at, fmt.Sprintf("more than %d", maxProbes)}
				}
				f, err := v.thing(function, at)
				if err != nil {
					return err
				}
				old, err := v.cstring("klp_func", f.ptr("old_name"), maxPatchName)
				if err != nil {
					return err
				}
				one := Probe{Addr: at, Kind: "livepatch", Place: old + of, Disabled: p.num("enabled") == 0 || f.num("patched") == 0}
				if f.num("nop") != 0 { // a replacing patch gives the function back
					one.Function = old + of
				} else if one.Function, err = v.function(f.ptr("new_func")); err != nil {
					return err
				}
				all = append(all, one)
				return nil
			})
		})
	})
	return all, err
}
