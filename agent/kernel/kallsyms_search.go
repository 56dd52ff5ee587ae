package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

// The shape of the symbol table as scripts/kallsyms.c writes it: the tokens end with NUL, and most characters that names have
// are tokens of their own, the digits among them. Each table is aligned to 8 bytes (until v6.3) or 4.
//
//	until v6.3:  offsets, relative_base, num_syms, names, markers, token_table, token_index
//	since v6.4:  num_syms, names, markers, token_table, token_index, offsets, relative_base
const (
	// kallsymsMarkerEvery is how many names are between two of the kernel's own markers.
	kallsymsMarkerEvery = 256
	// kallsymsNameMax bounds the names behind the last marker.
	kallsymsTailMax = kallsymsMarkerEvery * 512
	kallsymsDigits  = "0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00"
)

// searchSymbols looks for the symbol table in the image, by its shape, and reads the first that proves right.
func (img *Image) searchSymbols(ctx context.Context, src source, missing string) (*symbolReader, string, error) {
	stext, ok := img.note.symbol("_stext")
	if !ok {
		return nil, "", &CorruptError{"VMCOREINFO", 0, "no _stext"}
	}
	end, err := img.imageEnd(src, stext)
	if err != nil {
		return nil, "", err
	}
	var detail string
	why := fmt.Errorf("VMCOREINFO does not name %s, and nothing in the image up to %v has the shape of a symbol table: %w", missing, end, ErrNotSupported)
	err = img.scanImage(ctx, src, stext, end, &pattern{bytes: []byte(kallsymsDigits), hit: func(digits VirtAddr) (bool, error) {
		places, err := img.symbolShapes(src, digits, stext)
		if err != nil {
			return false, err
		}
		for _, at := range places {
			d, err := img.readSymbols(src, at)
			var corrupt *CorruptError
			switch {
			case err == nil:
				detail = fmt.Sprintf("%s, found by their shape", d)
				return true, nil
			case !errors.As(err, &corrupt):
				return false, err
			}
			why = err
		}
		return false, nil
	}})
	if err != nil {
		return nil, "", err
	}
	if detail == "" {
		return nil, "", why
	}
	return &symbolReader{img, src}, detail, nil
}

// symbolShapes returns where the parts of a symbol table may be whose tokens have the digits at the given place.
func (img *Image) symbolShapes(src source, digits, stext VirtAddr) ([]kallsymsPlaces, error) {
	// Back over the tokens 0 to '0'-1. Tokens are short: what is far away is none.
	const before, after = 4096, 16 << 10
	lo := max(digits-before, stext)
	b := make([]byte, digits-lo+after)
	if err := img.readImage(src, lo, b); err != nil {
		return nil, err
	}
	at := int(digits - lo)
	for range '0' {
		if at < 1 || b[at-1] != 0 {
			return nil, nil
		}
		at = bytes.LastIndexByte(b[:at-1], 0) + 1
	}
	tokens := lo + VirtAddr(at)
	var index [512]byte
	for i := range 256 {
		o := at - int(tokens-lo)
		index[2*i], index[2*i+1] = byte(o), byte(o>>8)
		n := bytes.IndexByte(b[at:], 0)
		if n < 0 {
			return nil, nil
		}
		at += n + 1
	}
	var found []kallsymsPlaces
	for _, align := range []VirtAddr{8, 4} {
		p := kallsymsPlaces{tokens: tokens, tokenIndex: alignUp(lo+VirtAddr(at), align)}
		if o := int(p.tokenIndex - lo); tokens%align != 0 || o+512 > len(b) || !bytes.Equal(b[o:o+512], index[:]) {
			continue
		}
		names, n, err := img.symbolNames(src, tokens, stext, align)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			continue
		}
		p.names, p.num = names, names-align
		size := alignUp(VirtAddr(4*n), align)
		below, above := p, p
		below.base = p.num - 8
		below.offsets = below.base - size
		above.offsets = p.tokenIndex + 512
		above.base = above.offsets + size
		bare := above // its offsets are relative to their own places
		bare.base = 0
		found = append(found, below, above, bare)
	}
	return found, nil
}

// symbolNames goes back from the tokens: over the markers, which fall to zero, to the names, whose every 256th begins where a
// marker says. It returns where the names begin and how many there are.
func (img *Image) symbolNames(src source, tokens, stext, align VirtAddr) (VirtAddr, int, error) {
	const most = kallsymsMaxSyms/kallsymsMarkerEvery + 2
	lo := max(tokens-4*most, stext)
	b := make([]byte, tokens-lo)
	if err := img.readImage(src, lo, b); err != nil {
		return 0, 0, err
	}
	o := len(b) - 4
	if align == 8 && o >= 4 && le32(b[o:]) == 0 {
		o -= 4 // of the alignment
	}
	last := o
	for ; o >= 4 && le32(b[o:]) != 0 && le32(b[o-4:]) < le32(b[o:]); o -= 4 {
	}
	if o < 0 || le32(b[o:]) != 0 || last-o < 4*16 {
		return 0, 0, nil
	}
	markers := make([]uint32, 0, (last-o)/4+1)
	for at := o; at <= last; at += 4 {
		markers = append(markers, le32(b[at:]))
	}
	end := lo + VirtAddr(o) // of the names
	tail := VirtAddr(markers[len(markers)-1])
	if tail > kallsymsMaxNames || tail > end-stext {
		return 0, 0, nil
	}
	from := (end - min(tail+kallsymsTailMax, end-stext)) &^ 7
	names := make([]byte, end-from)
	if err := img.readImage(src, from, names); err != nil {
		return 0, 0, err
	}
	for start := int(end-from-tail) &^ 3; start >= int(align); start -= 4 {
		n := int(le32(names[start-int(align):]))
		if n <= (len(markers)-1)*kallsymsMarkerEvery || n > len(markers)*kallsymsMarkerEvery || (from+VirtAddr(start))%align != 0 {
			continue
		}
		if namesFit(names[start:], markers, n) {
			return from + VirtAddr(start), n, nil
		}
	}
	return 0, 0, nil
}

// namesFit reports whether n names begin where the markers say and leave no room for another before the end.
func namesFit(names []byte, markers []uint32, n int) bool {
	at := 0
	for i := range n {
		if i%kallsymsMarkerEvery == 0 && markers[i/kallsymsMarkerEvery] != uint32(at) {
			return false
		}
		var ok bool
		if _, at, ok = nameAt(names, at); !ok {
			return false
		}
	}
	return len(names)-at < 8
}
