package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/redfish/host"
)

// measuredLog is where the event log is kept from the machine's start to its end: in memory, but longer than one worker lives.
const measuredLog = "/run/backdoor/eventlog"

// An attestation is the agent's word about itself, which its TPM signs. *attestation is a host.Attestor.
type attestation struct {
	tpm  *attest.TPM
	id   host.Identity
	path string
	// shown is the SHA-256 of the SubjectPublicKeyInfo of the key that the service shows now; nil before there is a service.
	shown func() attest.Digest
	// agreed is the digest of the access agreement that the agent obeys now, zero if there is none; nil before there is an engine.
	agreed func() attest.Digest

	mu  sync.Mutex // guards log, and keeps measuring and logging together
	log attest.Log
}

// openAttestation opens the machine's TPM and takes the event log over that the loader, or a worker before this one, has left. Without a TPM
// it is nil, and so it is when the TPM does not work: the agent is then unattested, and says so.
func openAttestation(log *slog.Logger) *attestation {
	tpm, err := attest.Open()
	if errors.Is(err, attest.ErrNoTPM) {
		log.Info("unattested: the machine has no TPM")
		return nil
	}
	if err == nil {
		var b *handover.Boot
		b, err = handover.Read(handover.Dir)
		var start attest.Log
		switch {
		case errors.Is(err, handover.ErrNone):
			err = nil
		case err == nil:
			start = b.Log
		}
		if err == nil {
			var a *attestation
			if a, err = newAttestation(tpm, start, measuredLog); err == nil {
				if start == nil {
					log.Warn("unattested: no loader has measured this image")
				}
				return a
			}
		}
		tpm.Close()
	}
	log.Error("unattested: the TPM does not work", "err", err)
	return nil
}

// newAttestation reads who the TPM is, and brings the log in step with it. start is the log at the image's start.
func newAttestation(tpm *attest.TPM, start attest.Log, path string) (*attestation, error) {
	a := &attestation{tpm: tpm, path: path, log: start}
	var err error
	if a.id.Properties, err = tpm.Properties(); err != nil {
		return nil, err
	}
	if a.id.EndorsementKey, err = tpm.EndorsementKey(); err != nil {
		return nil, err
	}
	der, err := tpm.Certificate(time.Now())
	if err != nil {
		return nil, err
	}
	a.id.Certificates = [][]byte{der}
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

// measured reports whether a loader has measured this image.
func (a *attestation) measured() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, ok := a.log.Image()
	return ok
}

// Identity implements host.Attestor.
func (a *attestation) Identity() host.Identity { return a.id }

// Quote implements host.Attestor. The key that the service shows and the agreement are measured first, if they are others than before.
func (a *attestation) Quote(nonce []byte, pcrs ...int) (attest.Quote, error) {
	if a.shown != nil {
		if err := a.identify(a.shown()); err != nil {
			return attest.Quote{}, err
		}
	}
	if a.agreed != nil {
		if err := a.agree(a.agreed()); err != nil {
			return attest.Quote{}, err
		}
	}
	return a.tpm.Quote(nonce, pcrs...)
}

// PCR implements host.Attestor.
func (a *attestation) PCR(pcr int) (attest.Digest, error) { return a.tpm.PCR(pcr) }

// EventLog implements host.Attestor.
func (a *attestation) EventLog() ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.MarshalBinary()
}

// Activate implements host.Attestor.
func (a *attestation) Activate(c attest.Challenge) ([]byte, error) { return a.tpm.Activate(c) }
