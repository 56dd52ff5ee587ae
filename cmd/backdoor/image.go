package main

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/images/bundler"
	"github.com/backdoor-rhs/backdoor/images/export"
	"github.com/backdoor-rhs/backdoor/internal/durable"
	"golang.org/x/crypto/ssh"
	sshagent "golang.org/x/crypto/ssh/agent"
)

// imageFlags are the flags of the verb image.
type imageFlags struct {
	keys, rootKeys, releaseKeys        list
	rootThreshold, releaseThreshold    int
	out, roots, machine, version, line string
	kernel, initramfs, dtb, dir, base  string
	epoch, minLoader                   uint
	valid                              time.Duration
	slotSize, stateSize                int64
	noGolden                           bool
}

var imageVerb = verb{
	name:  "image",
	args:  "key new|show FILE | roots new|rotate|sign|show FILE | build | sign FILE | verify FILE | inspect FILE | burn FILE DEVICE | export bfb|openbmc FILE",
	words: []string{"key", "roots", "build", "sign", "verify", "inspect", "burn", "export"},
	short: "signed update bundles for agents: keys, building, signing, the first installation",
	long: `A bundle is one signed file with all that an agent's machine boots. Its manifest is signed by a threshold of release keys; which keys
those are is a key set, signed by a threshold of root keys, and each new key set is signed by the root keys of the one before.

  key new FILE       make a key (PKCS#8); show FILE prints its public half, of OpenSSH keys as well
  roots new FILE     make the first key set of -root-key and -release-key, public keys or files with them
  roots rotate FILE  add the next key set, which replaces the one before when it is signed
  roots sign FILE    sign the newest key set with -key
  roots show FILE    tell what the newest key set is, and who has to sign it yet
  build              make a bundle of an image in build/images (-machine) or of -kernel, -initramfs and -dtb, signed with each -key
  sign FILE          add a signature to a bundle
  verify FILE        verify a bundle as a device does that trusts -roots
  inspect FILE       tell what is in a bundle, whoever signed it
  burn FILE DEVICE   format a disk, or make the image of one, with the bundle as its first image; all that was on it is lost
  export bfb FILE    a BlueField boot stream (-o) of a bundle that -roots verifies, on top of NVIDIA's for the card (-base default.bfb)
  export openbmc FILE  a tarball for an OpenBMC with a static flash layout, of a flash image that burn or a programmer made, for -machine, with the
                     RSA key that this OpenBMC trusts (-key); neither of the two was tried on hardware

A -key is a file, or agent:COMMENT for a key that an ssh-agent holds, for example one from a PKCS#11 token (ssh-add -s MODULE).

  backdoor image key new root.key; backdoor image key new release.key
  backdoor image roots new roots.json -root-key root.key -release-key release.key
  backdoor image roots sign roots.json -key root.key
  backdoor image build -machine dpu-arm64 -set-version 1.4.0 -epoch 1 -roots roots.json -key release.key -o dpu.bundle
  backdoor image verify dpu.bundle -roots roots.json
  backdoor image burn dpu.bundle disk.img -roots roots.json -state-size 256`,
	flags: func(fs *flag.FlagSet, o *options) {
		f := &o.img
		fs.Var(&f.keys, "key", "`key` to sign with; may be given several times")
		fs.Var(&f.rootKeys, "root-key", "public `key`, or file, that signs key sets; may be given several times")
		fs.Var(&f.releaseKeys, "release-key", "public `key`, or file, that signs bundles; may be given several times")
		fs.IntVar(&f.rootThreshold, "root-threshold", 1, "`number` of root keys that have to sign")
		fs.IntVar(&f.releaseThreshold, "release-threshold", 1, "`number` of release keys that have to sign")
		fs.StringVar(&f.roots, "roots", "", "`file` with the key sets")
		fs.StringVar(&f.out, "o", "", "output `file`")
		fs.StringVar(&f.machine, "machine", "", "`class` of machines, the name of an image")
		fs.StringVar(&f.version, "set-version", "", "`version` of the bundle")
		fs.UintVar(&f.epoch, "epoch", 1, "security epoch; devices never go back below one that they ran")
		fs.UintVar(&f.minLoader, "min-loader", 0, "lowest version of the loader that can start it")
		fs.StringVar(&f.line, "command-line", "", "the kernel's command `line` (default the image's)")
		fs.StringVar(&f.kernel, "kernel", "", "kernel `file` instead of the image's")
		fs.StringVar(&f.initramfs, "initramfs", "", "initramfs `file` instead of the image's")
		fs.StringVar(&f.dtb, "dtb", "", "device tree `file` instead of the image's")
		fs.StringVar(&f.dir, "images", "", "`directory` with the images (default build/images)")
		fs.DurationVar(&f.valid, "valid", 365*24*time.Hour, "`time` from now until when it can be installed")
		fs.Int64Var(&f.slotSize, "slot-size", 0, "`MiB` of each slot (default one and a half times the bundle)")
		fs.Int64Var(&f.stateSize, "state-size", 0, "`MiB` for the agent's file system, which is then to be made: mkfs.ext4 -L backdoor-state")
		fs.StringVar(&f.base, "base", "", "NVIDIA's boot stream `file` for the card")
		fs.BoolVar(&f.noGolden, "no-recovery", false, "leave out the recovery image, where there is no room for it")
		fs.BoolVar(&o.yes, "y", false, "do not ask before a device is formatted")
	},
	run: runImage,
}

func runImage(_ context.Context, e *env, args []string) (int, error) {
	word, args := args[0], args[1:]
	need := func(n int) error {
		if len(args) != n {
			return &usageError{verb: "image", msg: fmt.Sprintf("image %s takes %d arguments, and there are %d", word, n, len(args))}
		}
		return nil
	}
	type step struct {
		args int
		run  func() (int, error)
	}
	steps := map[string]step{
		"build": {0, e.buildImage},
		"sign":  {1, func() (int, error) { return e.signImage(args[0]) }}, "verify": {1, func() (int, error) { return e.verifyImage(args[0]) }},
		"export":  {2, func() (int, error) { return e.exportImage(args[0], args[1]) }},
		"inspect": {1, func() (int, error) { return e.inspectImage(args[0]) }}, "burn": {2, func() (int, error) { return e.burnImage(args[0], args[1]) }},
		"key": {2, func() (int, error) { return e.imageKey(args[0], args[1]) }}, "roots": {2, func() (int, error) { return e.imageRoots(args[0], args[1]) }},
	}
	s := steps[word]
	if err := need(s.args); err != nil {
		return 0, err
	}
	return s.run()
}

// publicKey is how a public key is written: base64 of its 32 bytes.
func publicKey(k ed25519.PublicKey) string { return base64.StdEncoding.EncodeToString(k) }

func (e *env) imageKey(word, path string) (int, error) {
	var public ed25519.PublicKey
	switch word {
	case "new":
		k, err := bundler.NewKey(path)
		if err != nil {
			return 0, fmt.Errorf("make key: %w", err)
		}
		public = k.Public().(ed25519.PublicKey)
	case "show":
		k, err := e.readPublic(path)
		if err != nil {
			return 0, err
		}
		public = k
	default:
		return 0, &usageError{verb: "image", msg: fmt.Sprintf("image key: %q is neither new nor show", word)}
	}
	return exitOK, e.answer(map[string]string{"id": bundle.KeyID(public), "public": publicKey(public)}, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "id      %s\npublic  %s\n", bundle.KeyID(public), publicKey(public))
		return err
	})
}

// readPublic reads a public key: itself in base64, a file with one (OpenSSH), or a file with the private half.
func (e *env) readPublic(s string) (ed25519.PublicKey, error) {
	if b, err := base64.StdEncoding.DecodeString(s); err == nil && len(b) == ed25519.PublicKeySize {
		return b, nil
	}
	text, err := os.ReadFile(s)
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	if k, _, _, _, err := ssh.ParseAuthorizedKey(text); err == nil {
		c, ok := k.(ssh.CryptoPublicKey)
		if !ok {
			return nil, fmt.Errorf("read public key: %s holds no Ed25519 key", s)
		}
		public, ok := c.CryptoPublicKey().(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("read public key: %s holds a key of another kind than Ed25519", s)
		}
		return public, nil
	}
	k, err := e.signer(s)
	if err != nil {
		return nil, err
	}
	return k.Public().(ed25519.PublicKey), nil
}

// signer opens a private key: a file (PKCS#8 or OpenSSH), or agent:COMMENT.
func (e *env) signer(name string) (crypto.Signer, error) {
	if comment, ok := strings.CutPrefix(name, "agent:"); ok {
		return agentKey(os.Getenv("SSH_AUTH_SOCK"), comment)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	b, _ := pem.Decode(text)
	if b == nil {
		return nil, fmt.Errorf("read key: %s holds no PEM private key; make one with: backdoor image key new FILE", name)
	}
	var k any
	if b.Type == "OPENSSH PRIVATE KEY" {
		k, err = ssh.ParseRawPrivateKey(text)
		var locked *ssh.PassphraseMissingError
		if errors.As(err, &locked) {
			pass, perr := e.askSecret(fmt.Sprintf("Passphrase of %s: ", name))
			if perr != nil {
				return nil, perr
			}
			k, err = ssh.ParseRawPrivateKeyWithPassphrase(text, []byte(pass))
		}
	} else {
		k, err = x509.ParsePKCS8PrivateKey(b.Bytes)
	}
	if err != nil {
		return nil, fmt.Errorf("read key: %s: %w", name, err)
	}
	switch k := k.(type) {
	case ed25519.PrivateKey:
		return k, nil
	case *ed25519.PrivateKey:
		return *k, nil
	}
	return nil, fmt.Errorf("read key: %s holds a key of another kind than Ed25519", name)
}

// agentSigner is a key that an ssh-agent holds.
type agentSigner struct {
	socket string
	key    ssh.PublicKey
	public ed25519.PublicKey
}

func (a *agentSigner) Public() crypto.PublicKey { return a.public }

// Sign has the agent sign: an Ed25519 signature of SSH is a plain one (RFC 8709, section 6).
func (a *agentSigner) Sign(_ io.Reader, message []byte, _ crypto.SignerOpts) ([]byte, error) {
	conn, err := net.Dial("unix", a.socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	sig, err := sshagent.NewClient(conn).Sign(a.key, message)
	if err != nil {
		return nil, fmt.Errorf("ssh-agent: %w", err)
	}
	if sig.Format != ssh.KeyAlgoED25519 {
		return nil, fmt.Errorf("ssh-agent made a signature of the kind %q", sig.Format)
	}
	return sig.Blob, nil
}

func agentKey(socket, comment string) (crypto.Signer, error) {
	if socket == "" {
		return nil, errors.New("no ssh-agent: SSH_AUTH_SOCK is not set")
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("ssh-agent: %w", err)
	}
	defer conn.Close()
	keys, err := sshagent.NewClient(conn).List()
	if err != nil {
		return nil, fmt.Errorf("ssh-agent: %w", err)
	}
	for _, k := range keys {
		if k.Comment != comment || k.Format != ssh.KeyAlgoED25519 {
			continue
		}
		parsed, err := ssh.ParsePublicKey(k.Blob)
		if err != nil {
			return nil, fmt.Errorf("ssh-agent: %w", err)
		}
		return &agentSigner{socket, parsed, parsed.(ssh.CryptoPublicKey).CryptoPublicKey().(ed25519.PublicKey)}, nil
	}
	return nil, fmt.Errorf("the ssh-agent has no Ed25519 key with the comment %q", comment)
}

func (e *env) signers() (all []crypto.Signer, err error) {
	for _, name := range e.o.img.keys {
		s, err := e.signer(name)
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

// readRoots reads a file of key sets. Those that are not signed yet are there as well; the caller decides what that means.
func readRoots(path string) ([]bundle.Envelope, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read key sets: %w", err)
	}
	var chain []bundle.Envelope
	if err := json.Unmarshal(text, &chain); err != nil || len(chain) == 0 {
		return nil, fmt.Errorf("read key sets: %s holds none: %w", path, err)
	}
	return chain, nil
}

// trusted reads a file of key sets that are signed.
func (e *env) trusted() ([]bundle.Envelope, bundle.Root, error) {
	if e.o.img.roots == "" {
		return nil, bundle.Root{}, &usageError{verb: "image", msg: "give the key sets: -roots FILE"}
	}
	text, err := os.ReadFile(e.o.img.roots)
	if err != nil {
		return nil, bundle.Root{}, fmt.Errorf("read key sets: %w", err)
	}
	chain, root, err := bundle.ParseRoots(text)
	if err != nil {
		return nil, bundle.Root{}, fmt.Errorf("%s: %w", e.o.img.roots, err)
	}
	return chain, root, nil
}

func (e *env) imageRoots(word, path string) (int, error) {
	f := &e.o.img
	var chain []bundle.Envelope
	var err error
	if word != "new" {
		if chain, err = readRoots(path); err != nil {
			return 0, err
		}
	}
	switch word {
	case "show":
		return e.showRoots(chain)
	case "new", "rotate":
		r := bundle.Root{Format: 1, Version: uint32(len(chain) + 1), Expires: time.Now().UTC().Add(f.valid).Truncate(time.Second)}
		role := func(names list, threshold int) (bundle.Role, error) {
			out := bundle.Role{Threshold: threshold}
			for _, n := range names {
				public, err := e.readPublic(n)
				if err != nil {
					return out, err
				}
				id := bundle.KeyID(public)
				out.Keys = append(out.Keys, id)
				if !slices.ContainsFunc(r.Keys, func(k bundle.Key) bool { return k.ID == id }) {
					r.Keys = append(r.Keys, bundle.Key{ID: id, Public: public})
				}
			}
			return out, nil
		}
		if r.Root, err = role(f.rootKeys, f.rootThreshold); err != nil {
			return 0, err
		}
		if r.Release, err = role(f.releaseKeys, f.releaseThreshold); err != nil {
			return 0, err
		}
		next, err := bundle.NewRoot(r)
		if err != nil {
			return 0, err
		}
		chain = append(chain, next)
	case "sign":
		keys, err := e.signers()
		if err != nil {
			return 0, err
		}
		if len(keys) == 0 {
			return 0, &usageError{verb: "image", msg: "image roots sign needs -key"}
		}
		for _, k := range keys {
			if err := chain[len(chain)-1].Sign(k); err != nil {
				return 0, err
			}
		}
	default:
		return 0, &usageError{verb: "image", msg: fmt.Sprintf("image roots: %q is none of new, rotate, sign, show", word)}
	}
	if word == "new" {
		if _, err := os.Stat(path); err == nil {
			return 0, fmt.Errorf("make key set: %s is there already", path)
		}
	}
	text, err := json.MarshalIndent(chain, "", "\t")
	if err != nil {
		return 0, err
	}
	if err := durable.WriteFile(path, append(text, '\n'), 0o644); err != nil {
		return 0, fmt.Errorf("write key sets: %w", err)
	}
	_, err = e.showRoots(chain) // signatures may well be missing yet
	return exitOK, err
}

func (e *env) showRoots(chain []bundle.Envelope) (int, error) {
	var r bundle.Root
	last := chain[len(chain)-1]
	if err := json.Unmarshal(last.Payload, &r); err != nil {
		return 0, fmt.Errorf("read key sets: %w", err)
	}
	root, verr := bundle.ReadRoots(chain)
	code := exitOK
	state := "signed"
	if verr != nil {
		code, state = exitDenied, verr.Error()
	} else {
		r = root
	}
	return code, e.answer(map[string]any{"root": r, "signatures": last.Signatures, "state": state}, func(w io.Writer) error {
		l := &lines{w: w}
		l.printf("key set   %d, until %s\n", r.Version, r.Expires.Format(time.RFC3339))
		for _, role := range []struct {
			name string
			r    bundle.Role
		}{{"root", r.Root}, {"release", r.Release}} {
			l.printf("%-9s %d of %d\n", role.name, role.r.Threshold, len(role.r.Keys))
			for _, id := range role.r.Keys {
				signed := ""
				if role.name == "root" && slices.ContainsFunc(last.Signatures, func(s bundle.Signature) bool { return s.KeyID == id }) {
					signed = "  has signed"
				}
				l.printf("  %s%s\n", id, signed)
			}
		}
		l.printf("state     %s\n", state)
		return l.err
	})
}

func (e *env) buildImage() (int, error) {
	f := &e.o.img
	if f.out == "" || f.machine == "" || f.version == "" {
		return 0, &usageError{verb: "image", msg: "image build needs -machine, -set-version, -roots and -o"}
	}
	roots, _, err := e.trusted()
	if err != nil {
		return 0, err
	}
	keys, err := e.signers()
	if err != nil {
		return 0, err
	}
	now := time.Now()
	err = bundler.MakeFile(f.out, bundler.Options{
		Machine: f.machine, Version: f.version, Epoch: uint32(f.epoch), MinLoader: uint32(f.minLoader), Released: now, Expires: now.Add(f.valid), CommandLine: f.line,
		Kernel: f.kernel, Initramfs: f.initramfs, DTB: f.dtb, Dir: f.dir, Roots: roots, Signers: keys,
	})
	if err != nil {
		return 0, fmt.Errorf("build %s: %w", f.out, err)
	}
	return e.inspectImage(f.out)
}

func (e *env) signImage(path string) (int, error) {
	keys, err := e.signers()
	if err != nil {
		return 0, err
	}
	if len(keys) == 0 {
		return 0, &usageError{verb: "image", msg: "image sign needs -key"}
	}
	in, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	roots, man, _, parts, err := bundle.Read(in)
	if err != nil {
		return 0, fmt.Errorf("sign %s: %w", path, err)
	}
	for _, k := range keys {
		if err := man.Sign(k); err != nil {
			return 0, fmt.Errorf("sign %s: %w", path, err)
		}
	}
	if err := durable.Write(path, 0o644, func(f *os.File) error { return bundle.Write(f, roots, man, parts) }); err != nil {
		return 0, fmt.Errorf("sign %s: %w", path, err)
	}
	return e.inspectImage(path)
}

func (e *env) verifyImage(path string) (int, error) {
	_, root, err := e.trusted()
	if err != nil {
		return 0, err
	}
	in, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	r, err := bundle.NewReader(in, bundle.Policy{Root: root, Product: bundler.Product, Machine: e.o.img.machine, MinEpoch: uint32(e.o.img.epoch), Now: time.Now()})
	if err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	if err != nil {
		return 0, &codeError{exitDenied, fmt.Errorf("verify %s: %w", path, err)}
	}
	return exitOK, e.answer(map[string]any{"manifest": r.Manifest, "signers": r.Signers, "keySet": r.Root.Version}, func(w io.Writer) error {
		l := &lines{w: w}
		l.printf("%s is good: %s %s for %s, epoch %d, %d bytes\n", path, r.Manifest.Product, r.Manifest.Version, r.Manifest.Machine, r.Manifest.Epoch, r.Size())
		for _, id := range r.Signers {
			l.printf("signed by %s\n", id)
		}
		l.printf("under key set %d; each byte is what was signed\n", r.Root.Version)
		return l.err
	})
}

func (e *env) inspectImage(path string) (int, error) {
	in, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	roots, man, m, _, err := bundle.Read(in)
	if err != nil {
		return 0, fmt.Errorf("inspect %s: %w", path, err)
	}
	return exitOK, e.answer(map[string]any{"manifest": m, "signatures": man.Signatures, "keySets": len(roots)}, func(w io.Writer) error {
		l := &lines{w: w}
		l.printf("product   %s %s\nmachine   %s, loader %d or later\n", m.Product, m.Version, m.Machine, m.MinLoader)
		l.printf("epoch     %d\nreleased  %s, to be installed by %s\n", m.Epoch, m.Released.Format(time.RFC3339), m.Expires.Format(time.RFC3339))
		l.printf("line      %s\n", m.CommandLine)
		for _, p := range m.Parts {
			l.printf("part      %-10s %9d bytes  sha256 %s\n", p.Name, p.Size, p.SHA256)
		}
		l.printf("key sets  1 to %d\n", len(roots))
		for _, s := range man.Signatures {
			l.printf("signed    %s (not verified here)\n", s.KeyID)
		}
		if len(man.Signatures) == 0 {
			l.printf("signed    by nobody yet\n")
		}
		return l.err
	})
}

func (e *env) burnImage(path, device string) (int, error) {
	f := &e.o.img
	_, root, err := e.trusted()
	if err != nil {
		return 0, err
	}
	if _, err := os.Stat(device); err == nil && !e.o.yes {
		yes, err := e.confirm(fmt.Sprintf("Format %s? All that is on it is lost.", device))
		if err != nil {
			return 0, err
		}
		if !yes {
			return 0, errors.New("nothing was done")
		}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	in, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	s, err := bundler.Burn(device, in, slot.Layout{Slot: f.slotSize << 20, Agent: f.stateSize << 20, NoGolden: f.noGolden},
		bundle.Policy{Root: root, Product: bundler.Product, Machine: f.machine, Now: time.Now()}, time.Now())
	if err != nil {
		return 0, fmt.Errorf("burn %s: %w", device, err)
	}
	return exitOK, e.answer(s, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s: version %s in slot a, to prove itself%s\n", device, s.A.Version, map[bool]string{true: "; and as the recovery image"}[cmp.Or(s.Golden.Status, "") == slot.Good])
		return err
	})
}

func (e *env) exportImage(form, path string) (int, error) {
	f := &e.o.img
	if f.out == "" {
		return 0, &usageError{verb: "image", msg: "image export needs -o"}
	}
	in, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	var write func(*os.File) error
	switch form {
	case "bfb":
		_, root, err := e.trusted()
		if err != nil {
			return 0, err
		}
		if f.base == "" {
			return 0, &usageError{verb: "image", msg: "image export bfb needs -base"}
		}
		base, err := os.Open(f.base)
		if err != nil {
			return 0, err
		}
		defer base.Close()
		st, err := base.Stat()
		if err != nil {
			return 0, err
		}
		img, err := bundle.OpenAt(in, bundle.Policy{Root: root, Product: bundler.Product})
		if err == nil {
			err = img.Verify()
		}
		if err != nil {
			return 0, &codeError{exitDenied, fmt.Errorf("export %s: %w", path, err)}
		}
		_, _, _, parts, err := bundle.Read(in)
		if err != nil {
			return 0, err
		}
		write = func(out *os.File) error {
			return export.BFB(out, bundle.Content{From: base, Size: st.Size()}, img, parts)
		}
	case "openbmc":
		if len(f.keys) != 1 || f.machine == "" || f.version == "" {
			return 0, &usageError{verb: "image", msg: "image export openbmc needs -machine, -set-version and one -key"}
		}
		key, err := readRSA(f.keys[0])
		if err != nil {
			return 0, err
		}
		st, err := in.Stat()
		if err != nil {
			return 0, err
		}
		write = func(out *os.File) error {
			return export.OpenBMC(out, bundle.Content{From: in, Size: st.Size()}, f.machine, f.version, time.Now(), key)
		}
	default:
		return 0, &usageError{verb: "image", msg: fmt.Sprintf("image export: %q is neither bfb nor openbmc", form)}
	}
	if err := durable.Write(f.out, 0o644, write); err != nil {
		return 0, fmt.Errorf("export %s: %w", path, err)
	}
	return exitOK, e.answer(map[string]string{"file": f.out}, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, f.out)
		return err
	})
}

func readRSA(path string) (*rsa.PrivateKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	k, err := ssh.ParseRawPrivateKey(text)
	if err != nil {
		return nil, fmt.Errorf("read key: %s: %w", path, err)
	}
	key, ok := k.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("read key: %s holds a key of another kind than RSA", path)
	}
	return key, nil
}
