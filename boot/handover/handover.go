// Package handover is what a loader tells the image that it starts: which slot it is, what was measured, what was passed over and
// why. It is a cpio archive behind the image's initramfs, so the kernel unpacks it into the root directory.
//
// Nothing in it is trusted by a verifier: the event log is worth what a quote confirms of it.
package handover

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/bundle"
)

// Dir is where the files are.
const Dir = "/etc/backdoor"

// The files in Dir.
const (
	FactsFile = "boot.json" // Facts
	LogFile   = "eventlog"  // attest.Log; absent if nothing was measured
	RootFile  = "root.json" // the key sets that the loader trusts, a list of bundle.Envelope
)

// MaxNotes bounds Facts.Notes.
const MaxNotes = 32

// Facts are what the loader knows of a start.
type Facts struct {
	Loader  uint32 `json:"loader"` // its version
	Slot    string `json:"slot"`
	Version string `json:"version"` // of the image
	Epoch   uint32 `json:"epoch"`   // of the image
	// Measured says that the image was measured into a TPM.
	Measured bool `json:"measured"`
	// Watchdog is the name of the one that is armed; empty if there is none.
	Watchdog string `json:"watchdog,omitempty"`
	// WatchdogReset says that the watchdog has reset the machine before this start.
	WatchdogReset bool `json:"watchdogReset,omitempty"`
	// Fallback says why another image than the one that was to run runs; the slots' state has it too.
	Fallback string `json:"fallback,omitempty"`
	// Notes are what went wrong, for people.
	Notes []string `json:"notes,omitempty"`
}

// Archive is the archive (newc) that hands on the facts, the event log (nil if nothing was measured) and the key sets.
func (f Facts) Archive(log attest.Log, roots []byte) ([]byte, error) {
	facts, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for _, dir := range []string{"etc", "etc/backdoor"} {
		entry(&b, dir, 0o040755, nil)
	}
	entry(&b, "etc/backdoor/"+FactsFile, 0o100644, facts)
	entry(&b, "etc/backdoor/"+RootFile, 0o100644, roots)
	if log != nil {
		text, err := log.MarshalBinary()
		if err != nil {
			return nil, err
		}
		entry(&b, "etc/backdoor/"+LogFile, 0o100644, text)
	}
	entry(&b, "TRAILER!!!", 0, nil)
	return b.Bytes(), nil
}

// entry writes one entry of a cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst, Linux 6.1).
func entry(b *bytes.Buffer, name string, mode int, data []byte) {
	pad := func() { b.Write(make([]byte, -b.Len()&3)) }
	fmt.Fprintf(b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", 0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	b.WriteString(name)
	b.WriteByte(0)
	pad()
	b.Write(data)
	pad()
}

// A Boot is what was handed on.
type Boot struct {
	Facts
	Log   attest.Log // nil if nothing was measured
	Roots []bundle.Envelope
}

// ErrNone says that no loader has started this machine.
var ErrNone = errors.New("no loader has started this machine")

// Read reads what was handed on to dir; [ErrNone] if nothing was.
func Read(dir string) (*Boot, error) {
	read := func(name string) ([]byte, error) {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return io.ReadAll(io.LimitReader(f, 2<<20))
	}
	text, err := read(FactsFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNone
	}
	if err != nil {
		return nil, fmt.Errorf("read what the loader says: %w", err)
	}
	b := &Boot{}
	if err := json.Unmarshal(text, &b.Facts); err != nil { // a newer loader may say more
		return nil, fmt.Errorf("read what the loader says: %w", err)
	}
	if text, err = read(RootFile); err == nil {
		err = json.Unmarshal(text, &b.Roots)
	}
	if err != nil {
		return nil, fmt.Errorf("read the loader's key sets: %w", err)
	}
	text, err = read(LogFile)
	if errors.Is(err, fs.ErrNotExist) {
		return b, nil
	}
	if err == nil {
		b.Log, err = attest.ParseLog(text)
	}
	if err != nil {
		return nil, fmt.Errorf("read the loader's event log: %w", err)
	}
	return b, nil
}

// Measured returns what the loader measures of the bundle at the beginning of at, whose verified head is h, before it starts it.
func Measured(at io.ReaderAt, h *bundle.Head) (attest.Image, error) {
	_, envelope, _, _, err := bundle.Read(at)
	if err != nil {
		return attest.Image{}, err
	}
	if sha256.Sum256(envelope.Payload) != h.Digest {
		return attest.Image{}, errors.New("the manifest has changed since it was verified")
	}
	return Image(envelope.Payload, h.Manifest)
}

// Image is what the loader measures of an image with that manifest, whose signed text is payload.
func Image(payload []byte, m bundle.Manifest) (attest.Image, error) {
	i := attest.Image{Manifest: payload}
	for _, p := range m.Parts {
		sum, err := hex.DecodeString(p.SHA256)
		if err != nil || len(sum) != sha256.Size {
			return attest.Image{}, fmt.Errorf("part %s: %q is no SHA-256", p.Name, p.SHA256)
		}
		i.Parts = append(i.Parts, attest.Part{Name: p.Name, SHA256: attest.Digest(sum)})
	}
	return i, nil
}
