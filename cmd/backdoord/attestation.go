package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/internal/durable"
)

// measuredLog is where the event log is kept from the machine's start to its end: in memory, but longer than one worker lives.
const measuredLog = "/run/backdoor/eventlog"

// claims are what a service says of itself.
type claims struct {
	// shown is the SHA-256 of the SubjectPublicKeyInfo of the key that it shows now.
	shown func() attest.Digest
	// agreed is the digest of the access agreement that the agent obeys now, zero if there is none; it may be nil.
	agreed func() attest.Digest
}

// An attestation is the event log, in step with the TPM's PCRs.
type attestation struct {
	tpm  *attest.TPM
	path string
	// claims is what the service has to say of itself; it holds nil before there is a service.
	claims *atomic.Pointer[claims]

	mu  sync.Mutex // guards log, and keeps measuring and logging together
	log attest.Log
}

// newAttestation brings the log in step with the TPM. start is the log at the image's start, path where the log is kept.
func newAttestation(tpm *attest.TPM, start attest.Log, path string) (*attestation, error) {
	a := &attestation{tpm: tpm, path: path, claims: new(atomic.Pointer[claims]), log: start}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return a, nil
	}
	if err != nil {
		return nil, err
	}
	if a.log, err = attest.ParseLog(b); err != nil {
		return nil, err
	}
	return a, a.complete()
}

// complete measures the last event if it was logged and not measured any more: a worker can end in between.
func (a *attestation) complete() error {
	n := len(a.log)
	if n == 0 {
		return nil
	}
	last := a.log[n-1]
	is, err := a.tpm.PCR(last.PCR)
	if err != nil {
		return err
	}
	if is != a.log.Replay(last.PCR) && is == a.log[:n-1].Replay(last.PCR) {
		return a.tpm.Extend(last)
	}
	return nil
}

// identify measures the key that the service shows, unless it is the one that was measured last.
func (a *attestation) identify(spki attest.Digest) error {
	return a.measure(attest.TLSEvent(spki), spki, attest.Log.TLSKey)
}

// agree measures the access agreement that the agent obeys, unless it is the one that was measured last.
func (a *attestation) agree(digest attest.Digest) error {
	return a.measure(attest.AgreementEvent(digest), digest, attest.Log.Agreement)
}

// measure measures an event, unless the last of its kind says the same.
func (a *attestation) measure(e attest.Event, now attest.Digest, last func(attest.Log) (attest.Digest, bool)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if was, ok := last(a.log); ok && was == now {
		return nil
	}
	log := append(a.log[:len(a.log):len(a.log)], e)
	b, err := log.MarshalBinary()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(a.path), 0o700); err != nil {
		return err
	}
	if err := durable.WriteFile(a.path, b, 0o600); err != nil {
		return err
	}
	a.log = log
	return a.tpm.Extend(e)
}

// claim measures what the service claims, if there is a service.
func (a *attestation) claim() error {
	c := a.claims.Load()
	if c == nil {
		return nil
	}
	if err := a.identify(c.shown()); err != nil {
		return err
	}
	if c.agreed == nil {
		return nil
	}
	return a.agree(c.agreed())
}

// Quote signs the PCRs with the nonce. What the service claims is measured first, if it is something else than before.
func (a *attestation) Quote(nonce []byte, pcrs ...int) (attest.Quote, error) {
	if err := a.claim(); err != nil {
		return attest.Quote{}, err
	}
	return a.tpm.Quote(nonce, pcrs...)
}

// EventLog returns what was measured since the machine's reset.
func (a *attestation) EventLog() ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.MarshalBinary()
}
