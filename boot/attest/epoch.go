package attest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// epochIndex is the NV counter's index, in the range that the TCG leaves to the owner (Registry of Reserved TPM 2.0 Handles,
// 01800000 to 01BFFFFF).
const epochIndex tpm2.TPMHandle = 0x01800bd0

// ErrEpochForeign means that the TPM had counters before this one: a new counter then starts beyond all of them, and its value
// is no epoch.
var ErrEpochForeign = errors.New("the TPM has had other counters; the security epoch cannot be kept in it")

// maxStep bounds how far one call raises the epoch: a TPM's counter only knows one step at a time, and its memory wears.
const maxStep = 256

func epochPublic() tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: epochIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
		Attributes: tpm2.TPMANV{
			NT: tpm2.TPMNTCounter, OwnerWrite: true, OwnerRead: true, AuthRead: true, AuthWrite: true, NoDA: true,
			WriteSTClear: true, // TPM2_NV_WriteLock holds until the next reset
		},
	}
}

// epoch reads the counter; not defined is (name of what would be, 0, nil). t.mu is held.
func (t *TPM) epoch() (name tpm2.TPM2BName, value uint64, err error) {
	pub, err := tpm2.NVReadPublic{NVIndex: epochIndex}.Execute(t.t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return tpm2.TPM2BName{}, 0, nil
	}
	if err != nil {
		return tpm2.TPM2BName{}, 0, fmt.Errorf("find the epoch's counter: %w", err)
	}
	p, err := pub.NVPublic.Contents()
	if err != nil {
		return tpm2.TPM2BName{}, 0, fmt.Errorf("find the epoch's counter: %w", err)
	}
	if p.Attributes.NT != tpm2.TPMNTCounter || p.DataSize != 8 {
		return tpm2.TPM2BName{}, 0, fmt.Errorf("NV index %#x is not a counter: somebody else uses it", epochIndex)
	}
	r, err := tpm2.NVRead{
		AuthHandle: t.owner(), NVIndex: tpm2.NamedHandle{Handle: epochIndex, Name: pub.NVName}, Size: 8,
	}.Execute(t.t)
	if errors.Is(err, tpm2.TPMRCNVUninitialized) {
		return pub.NVName, 0, nil
	}
	if err == nil && len(r.Data.Buffer) != 8 {
		err = fmt.Errorf("%d bytes", len(r.Data.Buffer))
	}
	if err != nil {
		return tpm2.TPM2BName{}, 0, fmt.Errorf("read the epoch's counter: %w", err)
	}
	return pub.NVName, binary.BigEndian.Uint64(r.Data.Buffer), nil
}

func (t *TPM) owner() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
}

// Epoch returns the lowest security epoch that may run on this machine; 0 if none was set yet.
func (t *TPM) Epoch() (uint64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, v, err := t.epoch()
	return v, err
}

// RaiseEpoch raises the epoch, never to be lowered again; it makes the counter if there is none. A lower value than the
// epoch's is no error and changes nothing.
func (t *TPM) RaiseEpoch(to uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	name, now, err := t.epoch()
	if err != nil {
		return err
	}
	if to <= now {
		return nil
	}
	if to-now > maxStep {
		return fmt.Errorf("raise the epoch from %d to %d: more than %d at a time", now, to, maxStep)
	}
	if name.Buffer == nil {
		if _, err := (tpm2.NVDefineSpace{AuthHandle: t.owner(), PublicInfo: tpm2.New2B(epochPublic())}).Execute(t.t); err != nil {
			return fmt.Errorf("make the epoch's counter: %w", err)
		}
		if name, _, err = t.epoch(); err != nil {
			return err
		}
	}
	for now < to {
		_, err := tpm2.NVIncrement{AuthHandle: t.owner(), NVIndex: tpm2.NamedHandle{Handle: epochIndex, Name: name}}.Execute(t.t)
		if err != nil {
			return fmt.Errorf("raise the epoch to %d: %w", to, err)
		}
		before := now
		// The first step changes the counter's name: it has been written.
		if name, now, err = t.epoch(); err != nil {
			return err
		}
		if now > before+1 {
			_, uerr := tpm2.NVUndefineSpace{AuthHandle: t.owner(), NVIndex: tpm2.NamedHandle{Handle: epochIndex, Name: name}}.Execute(t.t)
			return errors.Join(ErrEpochForeign, uerr)
		}
	}
	return nil
}

// LockEpoch keeps everybody from raising the epoch until the machine's next reset. The loader calls it before it hands the
// machine over.
func (t *TPM) LockEpoch() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	name, _, err := t.epoch()
	if err != nil || name.Buffer == nil {
		return err
	}
	if _, err := (tpm2.NVWriteLock{AuthHandle: t.owner(), NVIndex: tpm2.NamedHandle{Handle: epochIndex, Name: name}}).Execute(t.t); err != nil {
		return fmt.Errorf("lock the epoch's counter: %w", err)
	}
	return nil
}
