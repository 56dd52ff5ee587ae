package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"sort"
	"strings"
	"sync"
)

// The symbol table that the kernel keeps of itself, scripts/kallsyms.c and kernel/kallsyms.c: names compressed with a
// table of 256 tokens, in the order of their addresses; of each address a 32-bit offset.
//
// Names: a length byte, since commit 73bbb94466fd ("kallsyms: support "big" kernel symbols") (in v6.1) with bit 7 set
// for a second byte of higher bits; before, lengths over 127 could not occur, so that one reader serves both. The first
// character of an expanded name is its type.
const (
	kallsymsMaxSyms  = 1 << 20 // Debian 6.12 has 163,000
	kallsymsMaxNames = 24 << 20
	kallsymsMarker   = 64 // names between two markers of ours
)

// kallsyms is a symbol table in its compressed form with two indexes: 13 to 17 bytes a symbol. It is immutable once the kernel
// is attached.
type kallsyms struct {
	places  kallsymsPlaces
	names   []byte
	tokens  [256]string
	markers []uint32 // offset in names of every kallsymsMarker-th name
	offsets []int32
	address func(offset int32, i int) VirtAddr
	formula string
	byHash  []uint32 // symbols in the order of the hashes of their names

	// more are symbols that the table lacks and that were found otherwise.
	more   map[string]VirtAddr
	sorted []moreSymbol // the same, by address

	// asked are the answers of symbol, from settle on: the walks of a pass ask for the same few hundred again and again.
	asked *askedSymbols

	hashes [256]tokenHash // of tokens
	heads  [256]tokenHash // of tokens that stand first in a name, and so begin with the type
	mul    uint64
}

// moreSymbol is a symbol that the table lacks.
type moreSymbol struct {
	va   VirtAddr
	name string
}

// askedSymbols is safe for concurrent use.
type askedSymbols struct {
	mu sync.RWMutex
	va map[string]VirtAddr // guarded by mu
}

// maxAsked bounds askedSymbols: beyond, a name is looked up each time.
const maxAsked = 2048

func (a *askedSymbols) get(name string) (VirtAddr, bool) {
	if a == nil {
		return 0, false
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	va, ok := a.va[name]
	return va, ok
}

func (a *askedSymbols) put(name string, va VirtAddr) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.va) < maxAsked {
		a.va[strings.Clone(name)] = va
	}
}

// tokenHash continues the polynomial hash of a name by one token: h*pow + sum.
type tokenHash struct{ pow, sum uint64 }

// kallsymsTables are the raw tables.
type kallsymsTables struct {
	names      []byte // may be longer than needed
	tokens     []byte
	tokenIndex []byte // 256 little-endian 16-bit offsets into tokens
	offsets    []byte // one little-endian 32-bit word a symbol
}

// kallsymsFormulas are the known ways to make an address of an offset. Which one a kernel uses is not told: it is inferred
// from the symbols whose addresses are known otherwise.
var kallsymsFormulas = []struct {
	name    string
	address func(base VirtAddr, tables VirtAddr) func(offset int32, i int) VirtAddr
}{
	// CONFIG_KALLSYMS_ABSOLUTE_PERCPU, x86-64 until v6.14: per-CPU offsets as they are, all else counted down from base-1.
	{"absolute-percpu", func(base, _ VirtAddr) func(int32, int) VirtAddr {
		return func(o int32, _ int) VirtAddr {
			if o >= 0 {
				return VirtAddr(o)
			}
			return base + VirtAddr(-1-int64(o))
		}
	}},
	// CONFIG_KALLSYMS_BASE_RELATIVE without it.
	{"base-relative", func(base, _ VirtAddr) func(int32, int) VirtAddr {
		return func(o int32, _ int) VirtAddr { return base + VirtAddr(uint32(o)) }
	}},
	// Relative to the place of the offset itself, for tables without kallsyms_relative_base.
	{"place-relative", func(_, tables VirtAddr) func(int32, int) VirtAddr {
		return func(o int32, i int) VirtAddr { return tables + VirtAddr(4*i) + VirtAddr(int64(o)) }
	}},
}

var errShortNames = errors.New("names end early")

// newKallsyms indexes the names of n symbols. Addresses are not known before infer.
func newKallsyms(t kallsymsTables, n int) (*kallsyms, error) {
	if n < 1 || n > kallsymsMaxSyms {
		return nil, fmt.Errorf("%d symbols are not plausible", n)
	}
	if len(t.tokenIndex) != 512 || len(t.offsets) != 4*n {
		return nil, fmt.Errorf("tables of %d and %d bytes do not fit %d symbols", len(t.tokenIndex), len(t.offsets), n)
	}
	k := &kallsyms{markers: make([]uint32, 0, n/kallsymsMarker+1), offsets: make([]int32, n)}
	for i := range k.tokens {
		at := int(le16(t.tokenIndex[2*i:]))
		if at > len(t.tokens) {
			return nil, fmt.Errorf("token %d is outside the table", i)
		}
		end := slices.Index(t.tokens[at:], 0)
		if end < 0 {
			return nil, fmt.Errorf("token %d does not end", i)
		}
		k.tokens[i] = string(t.tokens[at : at+end])
	}
	for i := range k.offsets {
		k.offsets[i] = int32(le32(t.offsets[4*i:]))
	}

	// The base of the hash is random: names come from the host, which must not be able to choose collisions.
	k.mul = maphash.Comparable(maphash.MakeSeed(), n)<<1 | 1
	hash := func(s string) tokenHash {
		h := tokenHash{pow: 1}
		for _, c := range []byte(s) {
			h = tokenHash{h.pow * k.mul, h.sum*k.mul + uint64(c)}
		}
		return h
	}
	for i, s := range k.tokens {
		k.hashes[i] = hash(s)
		k.heads[i] = hash(s[min(1, len(s)):])
	}

	keys := make([]uint64, n) // hash<<32 | symbol
	at := 0
	for i := range n {
		if i%kallsymsMarker == 0 {
			k.markers = append(k.markers, uint32(at))
		}
		body, next, ok := nameAt(t.names, at)
		if !ok {
			return nil, fmt.Errorf("name of symbol %d of %d at %d: %w", i, n, at, errShortNames)
		}
		if k.tokens[body[0]] == "" {
			return nil, fmt.Errorf("name of symbol %d of %d has no type", i, n)
		}
		keys[i] = uint64(k.hash(body))<<32 | uint64(i)
		at = next
	}
	k.names = slices.Clone(t.names[:at])
	k.byHash = sortByHash(keys)
	return k, nil
}

// nameAt returns the compressed name at offset at and the offset of the next.
func nameAt(names []byte, at int) (body []byte, next int, ok bool) {
	if at >= len(names) {
		return nil, 0, false
	}
	n := int(names[at])
	at++
	if n&0x80 != 0 {
		if at >= len(names) {
			return nil, 0, false
		}
		n = n&0x7f | int(names[at])<<7
		at++
	}
	if n == 0 || n > len(names)-at {
		return nil, 0, false
	}
	return names[at : at+n], at + n, true
}

// hash returns the hash of a compressed name without its type.
func (k *kallsyms) hash(body []byte) uint32 {
	h := k.heads[body[0]].sum
	for _, c := range body[1:] {
		t := &k.hashes[c]
		h = h*t.pow + t.sum
	}
	return mix(h)
}

func (k *kallsyms) hashString(name string) uint32 {
	var h uint64
	for _, c := range []byte(name) {
		h = h*k.mul + uint64(c)
	}
	return mix(h)
}

func mix(h uint64) uint32 { return uint32((h ^ h>>29) * 0x9e3779b97f4a7c15 >> 32) }

// sortByHash returns the lower halves of keys in the order of the upper ones: a radix sort of two passes.
func sortByHash(keys []uint64) []uint32 {
	other := make([]uint64, len(keys))
	for shift := 32; shift < 64; shift += 16 {
		var at [1<<16 + 1]uint32
		for _, key := range keys {
			at[key>>shift&0xffff+1]++
		}
		for i := 1; i < len(at); i++ {
			at[i] += at[i-1]
		}
		for _, key := range keys {
			p := &at[key>>shift&0xffff]
			other[*p] = key
			*p++
		}
		keys, other = other, keys
	}
	out := make([]uint32, len(keys))
	for i, key := range keys {
		out[i] = uint32(key)
	}
	return out
}

// body returns the compressed name of symbol i.
func (k *kallsyms) body(i int) []byte {
	at := int(k.markers[i/kallsymsMarker])
	for range i % kallsymsMarker {
		_, at, _ = nameAt(k.names, at)
	}
	body, _, _ := nameAt(k.names, at)
	return body
}

// name returns the type and the name of symbol i.
func (k *kallsyms) name(i int) (typ byte, name string) {
	var b []byte
	for _, c := range k.body(i) {
		b = append(b, k.tokens[c]...)
	}
	if len(b) == 0 {
		return 0, ""
	}
	return b[0], printable(b[1:])
}

// find returns the symbols of a name, in the order of their addresses.
func (k *kallsyms) find(name string) []int {
	h := k.hashString(name)
	at := sort.Search(len(k.byHash), func(i int) bool { return k.hash(k.body(int(k.byHash[i]))) >= h })
	var found []int
	for ; at < len(k.byHash); at++ {
		i := int(k.byHash[at])
		if k.hash(k.body(i)) != h {
			break
		}
		if _, s := k.name(i); s == name {
			found = append(found, i)
		}
	}
	return found
}

// infer chooses the formula by which every known symbol comes out right, and checks that the table is in order. It returns
// how many of the known symbols are in the table: without CONFIG_KALLSYMS_ALL only functions are.
func (k *kallsyms) infer(known map[string]VirtAddr, base, tables VirtAddr) (matched int, err error) {
	var why error
	for _, f := range kallsymsFormulas {
		address := f.address(base, tables)
		matched, err = 0, nil
		for name, want := range known {
			found := k.find(name)
			if len(found) == 0 {
				continue
			}
			right := slices.ContainsFunc(found, func(i int) bool { return address(k.offsets[i], i) == want })
			if !right {
				err = fmt.Errorf("%s: %s would be at %v, it is at %v", f.name, name, address(k.offsets[found[0]], found[0]), want)
				break
			}
			matched++
		}
		if err == nil && matched == 0 {
			err = fmt.Errorf("%s: none of %d known symbols is in the table", f.name, len(known))
		}
		if err != nil {
			why = errors.Join(why, err)
			continue
		}
		for i := 1; i < len(k.offsets); i++ {
			if a, b := address(k.offsets[i-1], i-1), address(k.offsets[i], i); a > b {
				return 0, fmt.Errorf("symbol %d at %v follows one at %v", i, b, a)
			}
		}
		k.address, k.formula = address, f.name
		return matched, nil
	}
	return 0, fmt.Errorf("no known encoding gives the known addresses: %w", why)
}

// symbol returns the address of a name that only one address has.
func (k *kallsyms) symbol(name string) (VirtAddr, error) {
	if va, ok := k.asked.get(name); ok {
		return va, nil
	}
	found := k.find(name)
	if len(found) == 0 {
		if va, ok := k.more[name]; ok {
			return va, nil
		}
		return 0, fmt.Errorf("symbol %q: %w", name, ErrNotFound)
	}
	va := k.address(k.offsets[found[0]], found[0])
	for _, i := range found[1:] {
		if k.address(k.offsets[i], i) != va {
			return 0, fmt.Errorf("symbol %q is at %d addresses: %w", name, len(found), ErrAmbiguous)
		}
	}
	k.asked.put(name, va)
	return va, nil
}

// add adds a symbol that the table may lack.
func (k *kallsyms) add(name string, va VirtAddr) {
	if len(k.find(name)) > 0 {
		return
	}
	if k.more == nil {
		k.more = make(map[string]VirtAddr)
	}
	k.more[name] = va
	k.sorted = nil
}

// bare returns the table without what depends on where the kernel is. The copy shares what is never written again.
func (k *kallsyms) bare() *kallsyms {
	b := *k
	b.address, b.formula, b.places, b.more, b.sorted, b.asked = nil, "", kallsymsPlaces{}, nil, nil, nil
	return &b
}

// settle puts what was added in order; nothing is added afterwards.
func (k *kallsyms) settle() {
	k.asked = &askedSymbols{va: make(map[string]VirtAddr)}
	for name, va := range k.more {
		k.sorted = append(k.sorted, moreSymbol{va, name})
	}
	slices.SortFunc(k.sorted, func(a, b moreSymbol) int { return cmp.Or(cmp.Compare(a.va, b.va), cmp.Compare(a.name, b.name)) })
}

// sizeAt returns how far it is from the symbol at va to the next; zero if there is none at va.
func (k *kallsyms) sizeAt(va VirtAddr) uint64 {
	i := sort.Search(len(k.offsets), func(i int) bool { return k.address(k.offsets[i], i) > va })
	if i == 0 || i == len(k.offsets) || k.address(k.offsets[i-1], i-1) != va {
		return 0
	}
	return uint64(k.address(k.offsets[i], i) - va)
}

// at returns the last symbol at or below va, and how far above it va is.
func (k *kallsyms) at(va VirtAddr) (name string, offset uint64, err error) {
	i := sort.Search(len(k.offsets), func(i int) bool { return k.address(k.offsets[i], i) > va })
	if i == 0 {
		return "", 0, fmt.Errorf("symbol at %v: %w", va, ErrNotFound)
	}
	i--
	start := k.address(k.offsets[i], i)
	for i > 0 && k.address(k.offsets[i-1], i-1) == start {
		i-- // of aliases, the first
	}
	_, name = k.name(i)
	if j := sort.Search(len(k.sorted), func(j int) bool { return k.sorted[j].va > va }); j > 0 && k.sorted[j-1].va > start {
		start = k.sorted[j-1].va
		for j > 1 && k.sorted[j-2].va == start {
			j--
		}
		name = k.sorted[j-1].name
	}
	return name, uint64(va - start), nil
}
