package hostmem

import (
	"fmt"
	"io"
)

// limeMagic is 0x4C694D45 in little-endian.
const limeMagic = "EMiL"

// limeHeaderSize is sizeof(lime_mem_range_header) of LiME 1.x, doc/README.md "Format":
//
//	u32 magic; u32 version; u64 s_addr; u64 e_addr (the last byte, not the one behind it); u8 reserved[8];
const limeHeaderSize = 32

// newLiME reads the chain of headers, each in front of its range's bytes.
func newLiME(r io.ReaderAt, size int64) (*Image, error) {
	var extents []Extent
	h := make([]byte, limeHeaderSize)
	for at := int64(0); at < size; {
		bad := func(format string, args ...any) error {
			return &ImageError{"LiME", at, fmt.Sprintf(format, args...)}
		}
		if size-at < limeHeaderSize {
			return nil, bad("header of range %d is cut after %d of %d bytes: the dump is truncated, take it again",
				len(extents), size-at, limeHeaderSize)
		}
		if _, err := readFull(r, h, at); err != nil {
			return nil, fmt.Errorf("read LiME header at %#x: %w", at, err)
		}
		if string(h[:4]) != limeMagic {
			return nil, bad("header of range %d has magic %#08x instead of 0x4c694d45: the dump is damaged", len(extents), le.Uint32(h))
		}
		start, last := le.Uint64(h[8:]), le.Uint64(h[16:])
		switch v := le.Uint32(h[4:]); {
		case v == 2:
			return nil, bad("compressed pages (version 2, AVML): convert it first: avml-convert IN OUT")
		case v != 1:
			return nil, bad("version %d is not known here, only 1", v)
		case len(extents) == maxPieces:
			return nil, bad("more than %d ranges: the dump is damaged", maxPieces)
		case last < start || last >= uint64(maxAddr):
			return nil, bad("range %d from %#x to %#x makes no sense: the dump is damaged", len(extents), start, last)
		}
		at += limeHeaderSize
		n := last - start + 1
		if n > uint64(size-at) {
			return nil, bad("range %d from %#x needs %d bytes and %d are left: the dump is truncated, take it again",
				len(extents), start, n, size-at)
		}
		extents = append(extents, Extent{Range{PhysAddr(start), n}, at})
		at += int64(n)
	}
	return newImage("LiME", r, unalias(extents), nil)
}
