package attest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// anchorIndex is the anchor's NV index, in the range that the TCG leaves to the owner.
const anchorIndex tpm2.TPMHandle = 0x01800bd1

// ErrNotOurs means that somebody else has made the anchor: with another secret, or for another owner.
var ErrNotOurs = errors.New("somebody else has made the TPM's memory of the access agreement")

// An Anchor is 64 bytes of a TPM's memory that only who knows a secret can write, or prove to be what was written with it: two digests,
// of a file as it is and as it is about to be. A file on a disk alone can be put back to what it once was; its digest here cannot.
//
// The secret is the authorisation of an ordinary NV index, made at the first Write and never changed. The index's policy, which grants
// nothing, says whose it is: it is part of what TPM2_NV_DefineSpace fixes for the index's life. Who has the authorisation of the TPM's owner
// hierarchy, that is, runs programs of its own on the machine, can remove the index, and cannot make one that passes for it.
type Anchor struct {
	t      *TPM
	secret []byte
	whose  Digest
}

// Anchor returns the TPM's anchor for who has that secret, of 32 bytes, and for that owner's public key.
//
// The authorisation has a one in place of each zero byte of the secret: a TPM drops zeros at an authorisation's end (TPM 2.0 Library, part 1,
// 19.6.5), and go-tpm, to v0.9.8, drops all from the first zero byte on, wherever that is, so that the two would not agree.
func (t *TPM) Anchor(secret, owner []byte) *Anchor {
	return &Anchor{t: t, secret: bytes.ReplaceAll(secret, []byte{0}, []byte{1}), whose: sha256.Sum256(append([]byte("backdoor anchor of the owner\n"), owner...))}
}

// Anchored reports whether the TPM has an anchor, be it whose it may.
func (t *TPM) Anchored() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, err := tpm2.NVReadPublic{NVIndex: anchorIndex}.Execute(t.t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for the TPM's anchor: %w", err)
	}
	return true, nil
}

// public is what TPM2_NV_DefineSpace makes.
func (a *Anchor) public() tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: anchorIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 2 * sha256.Size,
		Attributes: tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, AuthRead: true, AuthWrite: true, NoDA: true},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: a.whose[:]},
	}
}

// find returns the name of the index, no bytes if there is none, and whether it was ever written. a.t.mu is held.
func (a *Anchor) find() (name tpm2.TPM2BName, written bool, err error) {
	pub, err := tpm2.NVReadPublic{NVIndex: anchorIndex}.Execute(a.t.t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return tpm2.TPM2BName{}, false, nil
	}
	if err != nil {
		return name, false, err
	}
	is, err := pub.NVPublic.Contents()
	if err != nil {
		return name, false, err
	}
	want := a.public()
	written, want.Attributes.Written = is.Attributes.Written, is.Attributes.Written
	if !bytes.Equal(tpm2.Marshal(is), tpm2.Marshal(want)) {
		return name, false, fmt.Errorf("NV index %#x is for another owner, or another's: %w", anchorIndex, ErrNotOurs)
	}
	return pub.NVName, written, nil
}

func (a *Anchor) auth(name tpm2.TPM2BName) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: anchorIndex, Name: name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Auth(a.secret))}
}

// Read returns the digests that the last Write has left; ok is false if there was none yet.
func (a *Anchor) Read() (is, next [sha256.Size]byte, ok bool, err error) {
	a.t.mu.Lock()
	defer a.t.mu.Unlock()
	name, written, err := a.find()
	if err != nil {
		return is, next, false, fmt.Errorf("read the TPM's anchor: %w", err)
	}
	if name.Buffer == nil || !written {
		return is, next, false, nil
	}
	r, err := tpm2.NVRead{
		AuthHandle: a.auth(name), NVIndex: tpm2.NamedHandle{Handle: anchorIndex, Name: name}, Size: 2 * sha256.Size,
	}.Execute(a.t.t)
	if err == nil && len(r.Data.Buffer) != 2*sha256.Size {
		err = fmt.Errorf("%d bytes", len(r.Data.Buffer))
	}
	if err != nil {
		return is, next, false, fmt.Errorf("read the TPM's anchor: %w", notOurs(err))
	}
	return [sha256.Size]byte(r.Data.Buffer), [sha256.Size]byte(r.Data.Buffer[sha256.Size:]), true, nil
}

// Write replaces the digests, and makes the anchor if there is none.
func (a *Anchor) Write(is, next [sha256.Size]byte) error {
	a.t.mu.Lock()
	defer a.t.mu.Unlock()
	name, _, err := a.find()
	if err == nil && name.Buffer == nil {
		if err = a.define(); err == nil {
			name, _, err = a.find()
		}
	}
	if err == nil {
		_, err = tpm2.NVWrite{
			AuthHandle: a.auth(name), NVIndex: tpm2.NamedHandle{Handle: anchorIndex, Name: name},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: append(is[:], next[:]...)},
		}.Execute(a.t.t)
	}
	if err != nil {
		return fmt.Errorf("write the TPM's anchor: %w", notOurs(err))
	}
	return nil
}

// define makes the index. The secret crosses the wires between processor and TPM encrypted to the storage root key. a.t.mu is held.
func (a *Anchor) define() error {
	return a.t.withPrimary(tpm2.TPMRHOwner, tpm2.ECCSRKTemplate, func(srk primary) error {
		owner := a.t.owner()
		owner.Auth = tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Auth(nil), tpm2.AESEncryption(128, tpm2.EncryptIn), tpm2.Salted(srk.handle, srk.public))
		_, err := tpm2.NVDefineSpace{AuthHandle: owner, Auth: tpm2.TPM2BAuth{Buffer: a.secret}, PublicInfo: tpm2.New2B(a.public())}.Execute(a.t.t)
		return err
	})
}

// notOurs says what a wrong authorisation means.
func notOurs(err error) error {
	if errors.Is(err, tpm2.TPMRCAuthFail) || errors.Is(err, tpm2.TPMRCBadAuth) {
		return fmt.Errorf("%w (%w)", ErrNotOurs, err)
	}
	return err
}
