package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/internal/durable"
)

// sealed begins what a keySeal has encrypted.
var sealed = []byte("backdoor sealed 1\n")

// A keySeal keeps the agent's private keys such that neither the disk alone nor another image can use them: they are encrypted on the disk, and the
// machine's TPM gives the key out only to the images in the machine's slots. It is a service.Vault.
type keySeal struct {
	tpm  *attest.TPM
	file string
	// images returns what the key is to be sealed to: PCR values of the images that the machine may start.
	images func() []attest.Digest

	mu   sync.Mutex
	aead cipher.AEAD     // guarded by mu
	key  []byte          // guarded by mu
	to   []attest.Digest // guarded by mu: what the key is sealed to
}

// newKeySeal opens the sealed key in file, or makes one and seals it. An error that is attest.ErrWrongImage says that the key is there and not for this image.
func newKeySeal(tpm *attest.TPM, file string, images func() []attest.Digest) (*keySeal, error) {
	k := &keySeal{tpm: tpm, file: file, images: images}
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		k.key = make([]byte, 32)
		rand.Read(k.key)
	case err != nil:
		return nil, err
	default:
		s, err := attest.ParseSealed(b)
		if err != nil {
			return nil, err
		}
		if k.key, err = tpm.Unseal(s); err != nil {
			return nil, err
		}
		k.to = s.PCRs
	}
	c, err := aes.NewCipher(k.key)
	if err != nil {
		return nil, err
	}
	if k.aead, err = cipher.NewGCM(c); err != nil {
		return nil, err
	}
	if k.to == nil {
		return k, k.refresh()
	}
	return k, nil
}

// refresh seals the key to the images that may be started now, if they are others than those it is sealed to. It has to be called before a new image
// is started.
func (k *keySeal) refresh() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	to := k.images()
	if len(to) == 0 {
		return errors.New("no image to seal to")
	}
	slices.SortFunc(to, func(a, b attest.Digest) int { return bytes.Compare(a[:], b[:]) })
	to = slices.Compact(to)
	if slices.Equal(to, k.to) {
		return nil
	}
	s, err := k.tpm.Seal(k.key, to...)
	if err != nil {
		return err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(k.file, b, 0o600); err != nil {
		return err
	}
	k.to = to
	return nil
}

// derive returns a secret of 32 bytes for one purpose, which only they have who have the key.
func (k *keySeal) derive(purpose string) []byte {
	h := hmac.New(sha256.New, k.key)
	h.Write([]byte(purpose))
	return h.Sum(nil)
}

// Seal implements service.Vault.
func (k *keySeal) Seal(plain []byte) ([]byte, error) {
	nonce := make([]byte, k.aead.NonceSize())
	rand.Read(nonce)
	return k.aead.Seal(append(bytes.Clone(sealed), nonce...), nonce, plain, sealed), nil
}

// Open implements service.Vault. What was never sealed comes back as it is: it is from before there was a seal.
func (k *keySeal) Open(b []byte) (plain []byte, wasSealed bool, err error) {
	rest, ok := bytes.CutPrefix(b, sealed)
	if !ok {
		return b, false, nil
	}
	n := k.aead.NonceSize()
	if len(rest) < n {
		return nil, true, errors.New("the sealed key is cut off")
	}
	plain, err = k.aead.Open(nil, rest[:n], rest[n:], sealed)
	if err != nil {
		return nil, true, errors.New("the sealed key is damaged, or sealed by another machine")
	}
	return plain, true, nil
}

// A noKey stands for a seal that cannot be opened: by this image, or on this machine.
type noKey struct{ why error }

func (n noKey) Seal([]byte) ([]byte, error) { return nil, n.why }

func (n noKey) Open(b []byte) ([]byte, bool, error) {
	if !bytes.HasPrefix(b, sealed) {
		return b, false, nil
	}
	return nil, true, n.why
}

// keepSeal seals the agent's keys anew whenever the slots hold other images than before, until ctx ends.
func (w *worker) keepSeal(ctx context.Context) {
	if w.images == nil {
		return
	}
	select {
	case <-w.trust.opened:
	case <-ctx.Done():
		return
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var last uint64
	for {
		if seq := w.images.disk.State().Seq; seq != last {
			w.trust.refresh()
			last = seq
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// sealImages are the images that may open the agent's keys.
func (w *worker) sealImages() []attest.Digest {
	<-w.imagesOpen
	now, err := w.trust.tpm.PCR(attest.ImagePCR)
	if err != nil {
		w.log.Error("seal the agent's keys", "err", err)
		return nil
	}
	if w.images == nil {
		return []attest.Digest{now}
	}
	all, err := startable(w.images.disk, w.images.running, now)
	if err != nil {
		w.log.Error("find the images to seal the agent's keys to", "err", err)
	}
	return all
}

// startable returns the PCR values of the images in the slots that are signed as the running one is, and the one that is.
func startable(disk *slot.Disk, running slot.Name, now attest.Digest) ([]attest.Digest, error) {
	all := []attest.Digest{now}
	roots, _, _, _, err := bundle.Read(disk.Slot(running))
	if err != nil {
		return all, fmt.Errorf("read the running image's key sets: %w", err)
	}
	root, err := bundle.ReadRoots(roots)
	if err != nil {
		return all, fmt.Errorf("read the running image's key sets: %w", err)
	}
	for _, n := range []slot.Name{slot.A, slot.B, slot.Golden} {
		dev := disk.Slot(n)
		if dev == nil {
			continue
		}
		img, err := bundle.OpenAt(dev, bundle.Policy{Root: root})
		if err != nil {
			continue // empty, half written, or not ours
		}
		i, err := handover.Measured(dev, &img.Head)
		if err != nil {
			return all, err
		}
		all = append(all, i.PCR())
	}
	return all, nil
}
