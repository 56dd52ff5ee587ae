package bundle

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// A Content is where a part's bytes come from.
type Content struct {
	Name string
	From io.ReaderAt
	Size int64 // bytes
}

// Describe fills the parts of a manifest in from their contents, and puts it into an envelope, to be signed.
func Describe(m Manifest, parts []Content) (Envelope, error) {
	m.Parts = nil
	for _, c := range parts {
		sum := sha256.New()
		n, err := io.Copy(sum, io.NewSectionReader(c.From, 0, c.Size))
		if err == nil && n != c.Size {
			err = fmt.Errorf("it has %d of %d bytes", n, c.Size)
		}
		if err != nil {
			return Envelope{}, fmt.Errorf("hash %s: %w", c.Name, err)
		}
		m.Parts = append(m.Parts, Part{Name: c.Name, Size: c.Size, SHA256: hexSum(sum.Sum(nil))})
	}
	if err := m.Validate(); err != nil {
		return Envelope{}, fmt.Errorf("manifest: %w", err)
	}
	b, err := json.Marshal(m)
	return Envelope{PayloadType: typeManifest, Payload: b}, err
}

// Write writes a bundle. It does not ask whether the signatures suffice: signing can take several people and several runs.
func Write(w io.Writer, roots []Envelope, manifest Envelope, parts []Content) error {
	text, err := json.Marshal(head{Roots: roots, Manifest: manifest})
	if err != nil {
		return err
	}
	size := padded(int64(prefix + len(text)))
	if size > MaxHead {
		return fmt.Errorf("the head would have %d bytes, more than %d", size, MaxHead)
	}
	raw := make([]byte, size)
	copy(raw, magic[:])
	binary.LittleEndian.PutUint32(raw[8:], uint32(len(text)))
	copy(raw[prefix:], text)
	if _, err := w.Write(raw); err != nil {
		return err
	}
	for _, c := range parts {
		n, err := io.Copy(w, io.NewSectionReader(c.From, 0, c.Size))
		if err == nil && n != c.Size {
			err = fmt.Errorf("it has %d of %d bytes", n, c.Size)
		}
		if err == nil {
			_, err = w.Write(make([]byte, padded(c.Size)-c.Size))
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", c.Name, err)
		}
	}
	return nil
}

// Read takes a bundle apart without asking who signed it: what a tool does that shows it, or adds a signature. The parts are not
// verified. Devices use [NewReader] and [OpenAt].
func Read(at io.ReaderAt) (roots []Envelope, manifest Envelope, m Manifest, parts []Content, err error) {
	var pre [prefix]byte
	if _, err := at.ReadAt(pre[:], 0); err != nil || [8]byte(pre[:8]) != magic {
		return nil, Envelope{}, Manifest{}, nil, refusef(NotBundle, "it does not begin like one")
	}
	length := int64(binary.LittleEndian.Uint32(pre[8:]))
	if length < 2 || padded(prefix+length) > MaxHead {
		return nil, Envelope{}, Manifest{}, nil, refusef(Damaged, "its head has %d bytes, more than %d", length, MaxHead-prefix)
	}
	text := make([]byte, length)
	if _, err := at.ReadAt(text, prefix); err != nil && !errors.Is(err, io.EOF) {
		return nil, Envelope{}, Manifest{}, nil, fmt.Errorf("read bundle: %w", err)
	}
	var h head
	if err := decodeExact(text, &h); err != nil {
		return nil, Envelope{}, Manifest{}, nil, refusef(Damaged, "its head: %v", err)
	}
	if err := decodeExact(h.Manifest.Payload, &m); err != nil {
		return nil, Envelope{}, Manifest{}, nil, refusef(Damaged, "its manifest: %v", err)
	}
	if err := m.Validate(); err != nil {
		return nil, Envelope{}, Manifest{}, nil, refusef(Damaged, "its manifest: %v", err)
	}
	off := padded(prefix + length)
	for _, p := range m.Parts {
		parts = append(parts, Content{Name: p.Name, From: io.NewSectionReader(at, off, p.Size), Size: p.Size})
		off += padded(p.Size)
	}
	return h.Roots, h.Manifest, m, parts, nil
}
