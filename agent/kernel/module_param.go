package kernel

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// Parameter is a parameter of a module (struct kernel_param, include/linux/moduleparam.h).
type Parameter struct {
	Name string `json:"name"`
	Perm uint16 `json:"perm"` // of its file in /sys/module/NAME/parameters; with 0 it has none
	Type string `json:"type"` // int, bool, charp, array of uint, …; empty if the module has a way of its own
	// Value is as that file has it; empty if the type is.
	Value string `json:"value"`
}

const (
	maxParameters = 1 << 10 // of a module
	maxParamArray = 1 << 12 // elements
	maxParamText  = 4096
)

// paramKinds are the types whose operations (param_ops_NAME, kernel/params.c) this package knows, and how many bytes they have; of
// charp a pointer, of string a struct kparam_string.
var paramKinds = map[string]uint64{
	"byte": 1, "short": 2, "ushort": 2, "int": 4, "uint": 4, "long": 8, "ulong": 8, "ullong": 8, "hexint": 4,
	"bool": 1, "bool_enable_only": 1, "invbool": 1, "bint": 4, "charp": 8, "string": 0,
}

type paramWalk struct {
	v                          *View
	module, param, text, array *shape
	size                       uint64
	kinds                      map[VirtAddr]string // by their operations
	arrays                     VirtAddr
}

// ModuleParameters lists the parameters of a module that Modules has found.
func (v *View) ModuleParameters(m Module) ([]Parameter, error) {
	all, err := settle(v, func() ([]Parameter, error) {
		w := paramWalk{v: v, kinds: make(map[VirtAddr]string)}
		r := resolver{img: v.img}
		w.module = r.shape("module", "kp", "num_kp")
		w.param = r.shape("kernel_param", "name", "ops", "perm", "arg")
		w.size = r.size("kernel_param")
		w.text = r.shape("kparam_string", "string")
		w.array = r.shape("kparam_array", "max", "elemsize", "num", "ops", "elem")
		w.arrays = r.symbol("param_array_ops")
		if r.err != nil {
			return nil, r.err
		}
		for name := range paramKinds {
			if at, err := v.img.syms.symbol("param_ops_" + name); err == nil {
				w.kinds[at] = name
			}
		}
		return w.list(m.Addr)
	})
	if err != nil {
		return all, fmt.Errorf("parameters of module %s: %w", m.Name, err)
	}
	return all, nil
}

func (w *paramWalk) list(module VirtAddr) ([]Parameter, error) {
	v := w.v
	m, err := v.thing(w.module, module)
	if err != nil {
		return nil, err
	}
	n := m.num("num_kp")
	if n > maxParameters {
		return nil, m.corrupt("%d parameters", n)
	}
	all := make([]Parameter, 0, n)
	for i := range n {
		t, err := v.thing(w.param, m.ptr("kp")+VirtAddr(i*w.size))
		if err != nil {
			return all, err
		}
		p := Parameter{Perm: uint16(t.num("perm"))}
		if p.Name, err = v.cstring("kernel_param", t.ptr("name"), 256); err != nil {
			return all, err
		}
		if ops := t.ptr("ops"); ops == w.arrays {
			p.Type, p.Value, err = w.elements(t.ptr("arg"))
		} else if kind, ok := w.kinds[ops]; ok {
			p.Type = kind
			p.Value, err = w.value(kind, t.ptr("arg"))
		}
		if err != nil {
			return all, err
		}
		all = append(all, p)
	}
	return all, nil
}

// elements reads struct kparam_array.
func (w *paramWalk) elements(at VirtAddr) (typ, value string, err error) {
	v := w.v
	a, err := v.thing(w.array, at)
	if err != nil {
		return "", "", err
	}
	kind, ok := w.kinds[a.ptr("ops")]
	if !ok {
		return "", "", nil
	}
	n := a.num("max")
	if p := a.ptr("num"); p != 0 {
		set, err := v.Uint32(p)
		if err != nil {
			return "", "", err
		}
		n = min(n, uint64(set))
	}
	if n > maxParamArray {
		return "", "", a.corrupt("%d elements", n)
	}
	var values []string
	for i := range n {
		value, err := w.value(kind, a.ptr("elem")+VirtAddr(i*a.num("elemsize")))
		if err != nil {
			return "", "", err
		}
		values = append(values, value)
	}
	return "array of " + kind, strings.Join(values, ","), nil
}

// value reads a value and writes it as the kernel's param_get_… do.
func (w *paramWalk) value(kind string, at VirtAddr) (string, error) {
	v := w.v
	switch kind {
	case "string":
		t, err := v.thing(w.text, at)
		if err != nil {
			return "", err
		}
		return v.cstring("kparam_string", t.ptr("string"), maxParamText)
	case "charp":
		p, err := v.pointer("charp", at)
		if err != nil || p == 0 {
			return "(null)", err
		}
		return v.cstring("charp", p, maxParamText)
	}
	if !v.img.space.valid(at, 1) {
		return "", &CorruptError{"kernel_param", at, "not an address of the kernel"}
	}
	var b [8]byte
	if err := v.img.space.object(v, "kernel_param", at, b[:paramKinds[kind]]); err != nil {
		return "", err
	}
	n := binary.LittleEndian.Uint64(b[:])
	yes := map[bool]string{true: "Y", false: "N"}
	switch kind {
	case "bool", "bool_enable_only":
		return yes[n != 0], nil
	case "invbool":
		return yes[n == 0], nil
	case "short":
		return strconv.Itoa(int(int16(n))), nil
	case "int", "bint":
		return strconv.Itoa(int(int32(n))), nil
	case "long":
		return strconv.FormatInt(int64(n), 10), nil
	case "hexint":
		return fmt.Sprintf("%#08x", n), nil
	}
	return strconv.FormatUint(n, 10), nil
}
