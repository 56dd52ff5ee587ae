// Package bundler makes signed update files and disks from the images that package builder has built.
package bundler

import (
	"cmp"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/images/builder"
	"github.com/backdoor-rhs/backdoor/images/initramfs"
	"github.com/backdoor-rhs/backdoor/internal/durable"
)

// Product is what the manifests of the project's images say.
const Product = "backdoor"

// Options say what goes into a bundle.
type Options struct {
	Machine     string // the image's name, which is the class of machines
	Version     string
	Epoch       uint32 // default 1
	MinLoader   uint32
	Released    time.Time
	Expires     time.Time // default: a year after Released
	CommandLine string    // default: the image's, for the machine that it is tested on
	// Kernel, Initramfs and DTB are files. Empty ones are those of the image, in Dir.
	Kernel, Initramfs, DTB string
	Dir                    string // default build/images
	Notes                  map[string]string
	Roots                  []bundle.Envelope
	Signers                []crypto.Signer
}

// Make writes a bundle.
func Make(w io.Writer, o Options) error {
	o.Dir = cmp.Or(o.Dir, filepath.Join("build", "images"))
	if o.CommandLine == "" {
		o.CommandLine = "panic=-1 quiet"
		if img, err := builder.Lookup(o.Machine); err == nil {
			o.CommandLine = img.CommandLine()
		}
	}
	if o.Expires.IsZero() {
		o.Expires = o.Released.AddDate(1, 0, 0)
	}
	var parts []bundle.Content
	for _, p := range []struct{ name, file, suffix string }{
		{bundle.PartKernel, o.Kernel, ".vmlinuz"}, {bundle.PartInitramfs, o.Initramfs, ".cpio.zst"}, {bundle.PartDTB, o.DTB, ".dtb"},
	} {
		path := cmp.Or(p.file, filepath.Join(o.Dir, o.Machine+p.suffix))
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) && p.name == bundle.PartDTB && p.file == "" {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		parts = append(parts, bundle.Content{Name: p.name, From: f, Size: st.Size()})
	}
	whole := func(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }
	e, err := bundle.Describe(bundle.Manifest{
		Format: 1, Product: Product, Machine: o.Machine, Version: o.Version, Epoch: cmp.Or(o.Epoch, 1), MinLoader: o.MinLoader,
		Released: whole(o.Released), Expires: whole(o.Expires), CommandLine: o.CommandLine, Notes: o.Notes,
	}, parts)
	if err != nil {
		return err
	}
	for _, s := range o.Signers {
		if err := e.Sign(s); err != nil {
			return err
		}
	}
	return bundle.Write(w, o.Roots, e, parts)
}

// MakeFile writes a bundle to a file, which is there whole or not at all.
func MakeFile(path string, o Options) error {
	return durable.Write(path, 0o644, func(f *os.File) error { return Make(f, o) })
}

// Burn formats a disk, or a file that becomes the image of one, and puts a bundle on it as its first image. A file that is not there yet is
// made as large as the layout needs; a slot of 0 bytes is made as large as the bundle with half as much again.
func Burn(path string, in *os.File, l slot.Layout, p bundle.Policy, now time.Time) (slot.State, error) {
	img, err := bundle.OpenAt(in, p)
	if err != nil {
		return slot.State{}, err
	}
	if l.Slot == 0 {
		l.Slot = img.Size() + img.Size()/2
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err == nil {
			err = errors.Join(f.Truncate(l.Size()), f.Close())
		}
		if err != nil {
			return slot.State{}, fmt.Errorf("make %s: %w", path, err)
		}
	}
	f, err := slot.OpenFile(path, false)
	if err != nil {
		return slot.State{}, err
	}
	defer f.Close()
	disk, err := slot.Format(f, l)
	if err != nil {
		return slot.State{}, err
	}
	if err := disk.Provision(io.NewSectionReader(in, 0, img.Size()), p, now); err != nil {
		return slot.State{}, err
	}
	return disk.State(), f.Close()
}

// Loader writes a loader's initramfs with the key sets that it trusts: image is the file that package builder has built.
func Loader(path, image string, roots []bundle.Envelope) error {
	b, err := os.ReadFile(image)
	if err != nil {
		return err
	}
	text, err := json.Marshal(roots)
	if err != nil {
		return err
	}
	var a initramfs.Archive
	a.File(handover.Dir+"/"+handover.RootFile, text, 0o644)
	more, err := a.Bytes()
	if err != nil {
		return err
	}
	// The kernel takes several archives one after the other, each on a multiple of 4 bytes (Documentation/driver-api/early-userspace/buffer-format.rst).
	return durable.Write(path, 0o644, func(f *os.File) error {
		_, err := f.Write(append(append(b, make([]byte, -len(b)&3)...), more...))
		return err
	})
}

// Development returns a key that signs alone, and the key set that trusts it, from a directory; it makes them if they are not there.
// They are for a laboratory: who has the directory can sign for every machine that trusts it.
func Development(dir string) (ed25519.PrivateKey, []bundle.Envelope, error) {
	keyFile, rootsFile := filepath.Join(dir, "development.key"), filepath.Join(dir, "development-roots.json")
	key, err := readKey(keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, nil, err
		}
		if key, err = NewKey(keyFile); errors.Is(err, fs.ErrExist) { // another process was faster
			key, err = readKey(keyFile)
		}
	}
	if err != nil {
		return nil, nil, err
	}
	text, err := os.ReadFile(rootsFile)
	if errors.Is(err, fs.ErrNotExist) {
		public := key.Public().(ed25519.PublicKey)
		role := bundle.Role{Keys: []string{bundle.KeyID(public)}, Threshold: 1}
		e, err := bundle.NewRoot(bundle.Root{
			Format: 1, Version: 1, Expires: time.Now().UTC().AddDate(10, 0, 0).Truncate(time.Second), Keys: []bundle.Key{{ID: role.Keys[0], Public: public}}, Root: role, Release: role,
		})
		if err == nil {
			err = e.Sign(key)
		}
		if err == nil {
			text, err = json.MarshalIndent([]bundle.Envelope{e}, "", "\t")
		}
		if err == nil {
			err = durable.WriteFile(rootsFile, append(text, '\n'), 0o644)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("make key set: %w", err)
		}
	} else if err != nil {
		return nil, nil, err
	}
	chain, root, err := bundle.ParseRoots(text)
	if err == nil && root.Release.Keys[0] != bundle.KeyID(key.Public().(ed25519.PublicKey)) {
		err = fmt.Errorf("%s and %s do not belong together: remove both", keyFile, rootsFile)
	}
	return key, chain, err
}

// NewKey makes a key and writes it to a new file, which only its owner can read (PKCS#8, PEM).
func NewKey(path string) (ed25519.PrivateKey, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return private, errors.Join(pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der}), f.Sync(), f.Close())
}

func readKey(path string) (ed25519.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	b, _ := pem.Decode(data)
	if b == nil {
		return nil, fmt.Errorf("%s holds no PEM key", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	private, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a key of another kind than Ed25519", path)
	}
	return private, nil
}
