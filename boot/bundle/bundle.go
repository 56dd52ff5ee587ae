// Package bundle reads, verifies and makes signed update files.
//
// A bundle is one file: a head with the signed [Manifest] and the chain of signed key sets ([Root]) that lead to its signers,
// then the parts (kernel, initramfs, device tree) as they are, each on a block of its own. It is verified from a stream with
// constant memory by [NewReader], and where it is installed, in a slot that holds the same bytes, by [OpenAt]. Nothing in it is
// compressed: what its manifest says is what it takes. Format, rules and reasons are in DESIGN.md.
package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"
)

const (
	// BlockSize is what the head and each part are padded to with zeros, in bytes.
	BlockSize = 4096
	// MaxHead bounds the head, in bytes, with its padding.
	MaxHead = 128 << 10
	// prefix is what comes before the head's JSON: magic, its length, and four bytes of zeros.
	prefix = 16
)

// magic begins each bundle; the last byte is the version of the format.
var magic = [8]byte{0x89, 'B', 'D', 'U', '\r', '\n', 0, 1}

// head is the JSON at the beginning of a bundle.
type head struct {
	Roots    []Envelope `json:"roots"` // from the first on, one after the other
	Manifest Envelope   `json:"manifest"`
}

// A Reason says in one word why a bundle is refused; the words do not change.
type Reason string

// The reasons.
const (
	NotBundle    Reason = "not-a-bundle"   // not this format, or one that is newer than this program
	Damaged      Reason = "damaged"        // a byte is not what was signed
	Truncated    Reason = "truncated"      // it ends before its end
	TooLong      Reason = "too-long"       // it goes on behind its end
	TooLarge     Reason = "too-large"      // it does not fit
	BadSignature Reason = "bad-signature"  // not signed by enough of the keys that count
	Expired      Reason = "expired"        // it was to be installed earlier
	TooOld       Reason = "too-old"        // below the security epoch, or behind the device's key set
	WrongProduct Reason = "wrong-product"  // for something else
	WrongMachine Reason = "wrong-machine"  // for another class of machine
	LoaderTooOld Reason = "loader-too-old" // the device's loader cannot start it
)

// A RefusedError says why a bundle is refused. Whatever reads a bundle returns no other error than this and what its reader or
// device returns.
type RefusedError struct {
	Reason Reason
	Detail string
}

func (e *RefusedError) Error() string {
	return "bundle refused (" + string(e.Reason) + "): " + e.Detail
}

func refusef(r Reason, format string, a ...any) error {
	return &RefusedError{Reason: r, Detail: fmt.Sprintf(format, a...)}
}

// A Policy says what a device takes.
type Policy struct {
	// Root is the key set that the device trusts. A bundle may bring newer ones, each signed by the one before.
	Root Root
	// MinRoot is the version of the key set below which no bundle is taken, whatever Root says.
	MinRoot uint32
	// MinEpoch is the security epoch below which no bundle is taken.
	MinEpoch uint32
	// Product and Machine have to be the manifest's; empty ones are not compared.
	Product, Machine string
	// Loader is the version of the loader that will start it; 0 if there is none to ask.
	Loader uint32
	// Now is compared with the times of expiry; the zero time leaves that out, as a loader must: what is installed keeps starting.
	Now time.Time
	// MaxSize is the room for the bundle, in bytes; 0 is no bound.
	MaxSize int64
}

// A Head is the verified beginning of a bundle.
type Head struct {
	Manifest Manifest
	// Root is the newest key set that the bundle brings, the one that its manifest is signed under.
	Root Root
	// Signers are the IDs of the keys that signed the manifest.
	Signers []string
	// Digest is the SHA-256 of the manifest's signed bytes: it names all of the bundle that is ever executed.
	Digest [sha256.Size]byte

	raw   []byte // with padding
	parts []extent
	size  int64
}

// An extent is where a part lies.
type extent struct {
	Part
	off int64
	sum [sha256.Size]byte
}

// Size is the size of the whole bundle in bytes.
func (h *Head) Size() int64 { return h.size }

// Offset returns where the part's bytes begin in the bundle.
func (h *Head) Offset(part string) (int64, bool) {
	for _, p := range h.parts {
		if p.Name == part {
			return p.off, true
		}
	}
	return 0, false
}

// PartSize returns how many bytes a part has, without its padding; 0 if there is no such part.
func (h *Head) PartSize(part string) int64 {
	for _, p := range h.parts {
		if p.Name == part {
			return p.Size
		}
	}
	return 0
}

// padded rounds up to whole blocks.
func padded(n int64) int64 { return (n + BlockSize - 1) / BlockSize * BlockSize }

// readHead reads and verifies the head. Every byte of it counts: what is not exactly what this package would write is refused.
func readHead(in io.Reader, p Policy) (*Head, error) {
	var pre [prefix]byte
	if n, err := io.ReadFull(in, pre[:]); err != nil {
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("read bundle: %w", err)
		}
		if k := min(n, len(magic)); !bytes.Equal(pre[:k], magic[:k]) {
			return nil, refusef(NotBundle, "it does not begin like one")
		}
		return nil, refusef(Truncated, "it ends after %d bytes", n)
	}
	if !bytes.Equal(pre[:7], magic[:7]) {
		return nil, refusef(NotBundle, "it does not begin like one")
	}
	if pre[7] != magic[7] {
		return nil, refusef(NotBundle, "its format is version %d and this program knows version %d: install a release in between first", pre[7], magic[7])
	}
	length := int64(binary.LittleEndian.Uint32(pre[8:]))
	if length < 2 || padded(prefix+length) > MaxHead {
		return nil, refusef(Damaged, "its head has %d bytes, more than %d", length, MaxHead-prefix)
	}
	if binary.LittleEndian.Uint32(pre[12:]) != 0 {
		return nil, refusef(Damaged, "bytes 12 to 15 are not zero")
	}
	raw := make([]byte, padded(prefix+length))
	copy(raw, pre[:])
	if n, err := io.ReadFull(in, raw[prefix:]); err != nil {
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("read bundle: %w", err)
		}
		return nil, refusef(Truncated, "it ends in its head, after %d bytes", prefix+n)
	}
	text := raw[prefix : prefix+length]
	if !allZero(raw[prefix+length:]) {
		return nil, refusef(Damaged, "the head's padding is not zero")
	}
	var h head
	if err := decodeExact(text, &h); err != nil {
		return nil, refusef(Damaged, "its head: %v", err)
	}
	out := &Head{raw: raw}
	root, err := verifyChain(h.Roots, p.Root)
	if err != nil {
		return nil, err
	}
	if root.Version < p.MinRoot {
		return nil, refusef(TooOld, "its key set is version %d and this device takes %d or later", root.Version, p.MinRoot)
	}
	out.Root = root
	if out.Signers, err = h.Manifest.verify(typeManifest, root, root.Release); err != nil {
		return nil, err
	}
	if err := decodeExact(h.Manifest.Payload, &out.Manifest); err != nil {
		return nil, refusef(Damaged, "its manifest: %v", err)
	}
	out.Digest = sha256.Sum256(h.Manifest.Payload)
	if err := out.Manifest.Validate(); err != nil {
		return nil, refusef(Damaged, "its manifest: %v", err)
	}
	out.layOut()
	return out, out.check(p)
}

// layOut finds where the parts lie. Precondition: the manifest is valid, so that nothing overflows.
func (h *Head) layOut() {
	off := int64(len(h.raw))
	for _, p := range h.Manifest.Parts {
		e := extent{Part: p, off: off}
		copy(e.sum[:], p.digest())
		h.parts = append(h.parts, e)
		off += padded(p.Size)
	}
	h.size = off
}

// check compares a verified manifest with what the device takes.
func (h *Head) check(p Policy) error {
	m := &h.Manifest
	switch {
	case p.Product != "" && m.Product != p.Product:
		return refusef(WrongProduct, "it is %q and this device runs %q", m.Product, p.Product)
	case p.Machine != "" && m.Machine != p.Machine:
		return refusef(WrongMachine, "it is for machines of the class %q and this is a %q", m.Machine, p.Machine)
	case m.Epoch < p.MinEpoch:
		return refusef(TooOld, "its security epoch is %d and this device takes %d or later", m.Epoch, p.MinEpoch)
	case !p.Now.IsZero() && p.Now.After(m.Expires):
		return refusef(Expired, "it was to be installed by %s and now it is %s", m.Expires.Format(time.RFC3339), p.Now.UTC().Format(time.RFC3339))
	case !p.Now.IsZero() && p.Now.After(h.Root.Expires):
		return refusef(Expired, "its key set was good until %s and now it is %s", h.Root.Expires.Format(time.RFC3339), p.Now.UTC().Format(time.RFC3339))
	case p.Loader != 0 && m.MinLoader > p.Loader:
		return refusef(LoaderTooOld, "it needs loader %d and this device has %d", m.MinLoader, p.Loader)
	case p.MaxSize > 0 && h.size > p.MaxSize:
		return refusef(TooLarge, "it has %d bytes and there is room for %d", h.size, p.MaxSize)
	}
	return nil
}

// A Reader passes a bundle's bytes on and verifies them on their way. When Read returns io.EOF, and only then, the whole bundle
// went by and was what its signers signed. It keeps the head and one hash in memory.
type Reader struct {
	Head
	in   io.Reader
	pos  int64
	part int // the extent that pos is in or behind
	sum  hash.Hash
	err  error
}

// NewReader reads and verifies the head of a bundle; what is of no use to the device is refused before any part is read.
func NewReader(in io.Reader, p Policy) (*Reader, error) {
	h, err := readHead(in, p)
	if err != nil {
		return nil, err
	}
	return &Reader{Head: *h, in: in, sum: sha256.New()}, nil
}

// Read returns the next bytes of the bundle, from its first on, head and padding included.
func (r *Reader) Read(b []byte) (int, error) {
	if r.err != nil || len(b) == 0 {
		return 0, r.err
	}
	n, err := r.read(b)
	r.pos += int64(n)
	r.err = err
	return n, err
}

func (r *Reader) read(b []byte) (int, error) {
	if r.pos < int64(len(r.raw)) {
		return copy(b, r.raw[r.pos:]), nil
	}
	if r.part == len(r.parts) {
		var one [1]byte
		switch _, err := io.ReadFull(r.in, one[:]); {
		case err == nil:
			return 0, refusef(TooLong, "it goes on behind the %d bytes of its manifest", r.size)
		case errors.Is(err, io.EOF):
			return 0, io.EOF
		default:
			return 0, fmt.Errorf("read bundle: %w", err)
		}
	}
	p := &r.parts[r.part]
	end, padding := p.off+p.Size, false
	if r.pos >= end {
		end, padding = p.off+padded(p.Size), true
	}
	if int64(len(b)) > end-r.pos {
		b = b[:end-r.pos]
	}
	n, err := r.in.Read(b)
	if n == 0 {
		if errors.Is(err, io.EOF) {
			return 0, refusef(Truncated, "it ends after %d of %d bytes, in %s", r.pos, r.size, p.Name)
		}
		if err != nil {
			return 0, fmt.Errorf("read bundle: %w", err)
		}
		return 0, nil
	}
	// An error beside bytes comes again with the next read.
	if padding {
		if !allZero(b[:n]) {
			return n, refusef(Damaged, "the padding of %s is not zero", p.Name)
		}
	} else {
		r.sum.Write(b[:n])
		if r.pos+int64(n) == p.off+p.Size {
			if got := r.sum.Sum(nil); !bytes.Equal(got, p.sum[:]) {
				return n, refusef(Damaged, "%s has the hash %.16x… and its manifest says %.16x…", p.Name, got, p.sum)
			}
			r.sum.Reset()
		}
	}
	if r.pos+int64(n) == p.off+padded(p.Size) {
		r.part++
	}
	return n, nil
}

// An Image is a bundle that can be read anywhere: a file, or a slot that it is installed in.
type Image struct {
	Head
	at io.ReaderAt
}

// OpenAt reads and verifies the head of the bundle at the beginning of at. What lies behind its end does not count.
func OpenAt(at io.ReaderAt, p Policy) (*Image, error) {
	h, err := readHead(io.NewSectionReader(at, 0, MaxHead), p)
	if err != nil {
		return nil, err
	}
	return &Image{Head: *h, at: at}, nil
}

// Verify reads all parts and verifies them.
func (i *Image) Verify() error {
	r := &Reader{Head: i.Head, in: io.NewSectionReader(i.at, int64(len(i.raw)), i.size-int64(len(i.raw))), sum: sha256.New()}
	_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 256<<10))
	return err
}

// ReadPart reads a part into b, which has its size. Only when it returns nil does b hold what its signers signed. If b has the capacity
// for whole blocks, whole blocks are read, which spares a device's cache; what lies behind b is zero then.
func (i *Image) ReadPart(b []byte, name string) error {
	for _, p := range i.parts {
		if p.Name != name {
			continue
		}
		if int64(len(b)) != p.Size {
			return fmt.Errorf("read %s: %d bytes of room for %d", name, len(b), p.Size)
		}
		room := b
		if int64(cap(b)) >= padded(p.Size) {
			room = b[:padded(p.Size)]
		}
		sum := sha256.New()
		for at := 0; at < len(b); at += pieceSize {
			piece := room[at:min(at+pieceSize, len(room))]
			n, err := i.at.ReadAt(piece, p.off+int64(at))
			signed := min(len(piece), len(b)-at)
			if n < signed && errors.Is(err, io.EOF) {
				return refusef(Truncated, "%s has %d of %d bytes", name, at+n, p.Size)
			}
			if n < signed {
				return fmt.Errorf("read %s: %w", name, err)
			}
			sum.Write(piece[:signed])
		}
		clear(room[len(b):])
		if got := sum.Sum(nil); !bytes.Equal(got, p.sum[:]) {
			return refusef(Damaged, "%s has the hash %.16x… and its manifest says %.16x…", name, got, p.sum)
		}
		return nil
	}
	return fmt.Errorf("the bundle has no part %q", name)
}

// pieceSize is how much of a part is read at once, in bytes: whole blocks.
const pieceSize = 1 << 20

// decodeExact decodes JSON that has to be exactly what encoding/json makes of the value: no unknown, doubled or reordered field,
// no other spelling. So no byte can be changed without notice, not even in what is not signed.
func decodeExact(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	again, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, text) {
		return errors.New("it is not written in the one way that there is to write it")
	}
	return nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// hexSum is a SHA-256 in hexadecimal digits.
func hexSum(sum []byte) string { return hex.EncodeToString(sum) }
