package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/redfish/host"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// deviceWait bounds the wait for the drivers of the machine's devices: one that hangs must not keep the agent from its work.
const deviceWait = 30 * time.Second

// errNoTPM is why nothing is attested.
var errNoTPM = errors.New("the machine has no TPM that works")

// A trust is the machine's TPM and all that rests on it. A TPM takes its time, so the agent starts meanwhile. First comes the key that
// the agent's other keys are sealed by: where a loader has measured the image, Redfish waits for it. Then the TPM is asked who it is;
// until that is known it is starting. *trust is a host.Attestor.
type trust struct {
	log    *slog.Logger
	path   string                 // where the event log is kept
	file   string                 // of the sealed key
	images func() []attest.Digest // those that the key is to be sealed to
	loaded attest.Log             // what a loader has measured before this image started; nil if none has

	opened chan struct{} // closed when the next four are what they stay
	tpm    *attest.TPM   // nil: there is none that works
	word   *attestation  // nil: none
	seal   *keySeal      // nil: the keys are not sealed
	vault  service.Vault

	claims atomic.Pointer[claims] // nil before there is a service
	known  chan struct{}          // closed when the next two are what they stay, but for the certificates
	id     host.Identity
	err    error

	chain string     // file with the attestation key's certificate, if the machine's owner has made one
	mu    sync.Mutex // guards id.Certificates once known is closed
}

// newTrust reads what the loader has left.
func newTrust(stateDir string, images func() []attest.Digest, log *slog.Logger) *trust {
	t := &trust{
		log: log, path: measuredLog, file: filepath.Join(stateDir, "keys.sealed"), images: images,
		opened: make(chan struct{}), known: make(chan struct{}), chain: filepath.Join(stateDir, "attestation.pem"),
	}
	b, err := handover.Read(handover.Dir)
	switch {
	case err == nil:
		t.loaded = b.Log
	case !errors.Is(err, handover.ErrNone):
		log.Error("unattested: what the loader has left cannot be read", "err", err)
	}
	return t
}

// measured reports whether a loader has measured this image.
func (t *trust) measured() bool {
	_, ok := t.loaded.Image()
	return ok
}

// start brings the TPM into use when the machine has all its devices. It ends when the TPM is known, or ctx.
func (t *trust) start(ctx context.Context, devices <-chan struct{}) {
	select {
	case <-devices:
	case <-time.After(deviceWait):
		t.log.Error("a driver does not get ready; going on without", "after", deviceWait)
	case <-ctx.Done():
		return
	}
	began := time.Now()
	tpm, err := attest.Open()
	if err == nil {
		err = t.open(tpm)
	}
	switch {
	case errors.Is(err, attest.ErrNoTPM):
		t.log.Info("unattested: the machine has no TPM")
	case err != nil:
		t.log.Error("unattested: the TPM does not work", "err", err)
	case !t.measured():
		t.log.Warn("unattested: no loader has measured this image")
	}
	if t.tpm == nil {
		t.vault = plain{}
		if _, err := os.Stat(t.file); !errors.Is(err, fs.ErrNotExist) {
			t.vault = noKey{errors.New("the agent's keys are sealed by a TPM, and there is none that works")}
		}
		close(t.opened)
		t.err = errNoTPM
		close(t.known)
		return
	}
	close(t.opened)
	logStep(t.log, "TPM", began)
	began = time.Now()
	if t.id, t.err = t.identity(tpm); t.err != nil {
		t.log.Error("unattested: the TPM does not work", "err", t.err)
	}
	logStep(t.log, "TPM's identity", began)
	t.claim()
	close(t.known)
}

// open brings the event log in step with the TPM, and opens the key that others are sealed by.
func (t *trust) open(tpm *attest.TPM) error {
	word, err := newAttestation(tpm, t.loaded, t.path)
	if err != nil {
		return errors.Join(err, tpm.Close())
	}
	word.claims = &t.claims
	t.tpm, t.word = tpm, word
	if !t.measured() {
		return nil
	}
	if t.seal, err = newKeySeal(tpm, t.file, t.images); err != nil {
		t.log.Error("open the seal of the agent's keys", "err", err)
		t.vault = noKey{err}
		return nil
	}
	t.vault = t.seal
	return nil
}

// claim measures what the service claims, when both the service and the TPM are there.
func (t *trust) claim() {
	select {
	case <-t.opened:
	default:
		return
	}
	if t.word == nil {
		return
	}
	if err := t.word.claim(); err != nil {
		t.log.Error("measure what the service shows", "err", err)
	}
}

// identity reads who a TPM is.
func (t *trust) identity(tpm *attest.TPM) (id host.Identity, err error) {
	if id.Properties, err = tpm.Properties(); err != nil {
		return id, err
	}
	if id.EndorsementKey, err = tpm.EndorsementKey(); err != nil {
		return id, err
	}
	ak, err := tpm.AttestationKey()
	if err != nil {
		return id, err
	}
	if id.Certificates, err = t.certified(ak); err == nil {
		return id, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		t.log.Error("the owner's certificate for the attestation key is of no use", "err", err)
	}
	der, err := tpm.Certificate(time.Now())
	id.Certificates = [][]byte{der}
	return id, err
}

// certified reads the chain that the machine's owner has made for its attestation key.
func (t *trust) certified(ak attest.Key) (chain [][]byte, err error) {
	rest, err := os.ReadFile(t.chain)
	if err != nil {
		return nil, err
	}
	for {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		chain = append(chain, b.Bytes)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%s: no PEM block", t.chain)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err == nil {
		err = attest.CheckCertificate(leaf, ak)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.chain, err)
	}
	return chain, nil
}

// Certify implements host.Certifier.
func (t *trust) Certify(chain [][]byte) error {
	if _, err := t.Identity(); err != nil {
		return err
	}
	var text []byte
	for _, der := range chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := durable.WriteFile(t.chain, text, 0o600); err != nil {
		return fmt.Errorf("keep the attestation key's certificate: %w", err)
	}
	t.id.Certificates = chain
	return nil
}

// keys is where the service keeps its private keys; nil: as they are. Where they are sealed, each use waits for the TPM.
func (t *trust) keys() service.Vault {
	if t.measured() {
		return lateVault{t}
	}
	if _, err := os.Stat(t.file); err == nil {
		return noKey{errors.New("the agent's keys are sealed to a measured image, and this one was not measured")}
	}
	return nil
}

// refresh seals the key to the images that may be started now. It comes before each start of another one, so that this can open the keys.
func (t *trust) refresh() {
	select {
	case <-t.opened:
	default:
		return
	}
	if t.seal == nil {
		return
	}
	if err := t.seal.refresh(); err != nil {
		t.log.Error("seal the agent's keys to the images in the slots", "err", err)
	}
}

// anchor is what the lock of the access agreement is tied to, once the TPM is open; nil if there is nothing. Only the images in the machine's
// slots can use it: another one, or one whose sealed key was taken away, learns that there is one, and no more.
func (t *trust) anchor(owner []byte) access.Anchor {
	<-t.opened
	if t.tpm == nil {
		return nil
	}
	if t.seal != nil {
		return t.tpm.Anchor(t.seal.derive("anchor of the access agreement"), owner)
	}
	switch there, err := t.tpm.Anchored(); {
	case err != nil:
		return noAnchor{err}
	case there:
		return noAnchor{errors.New("it is tied to the TPM, by a key that this image cannot open")}
	}
	return nil
}

// A noAnchor stands for an anchor that cannot be used.
type noAnchor struct{ why error }

func (n noAnchor) Read() (is, next [sha256.Size]byte, ok bool, err error) {
	return is, next, false, n.why
}
func (n noAnchor) Write(is, next [sha256.Size]byte) error { return n.why }

// epoch is the TPM's security epoch; 0 without a TPM: the disk's word has to do then.
func (t *trust) epoch() (uint64, error) {
	select {
	case <-t.opened:
	default:
		return 0, host.ErrStarting
	}
	if t.tpm == nil {
		return 0, nil
	}
	return t.tpm.Epoch()
}

// Identity implements host.Attestor.
func (t *trust) Identity() (host.Identity, error) {
	select {
	case <-t.known:
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.id, t.err
	default:
		return host.Identity{}, host.ErrStarting
	}
}

// Quote implements host.Attestor. What the service claims is measured first, if it is something else than before.
func (t *trust) Quote(nonce []byte, pcrs ...int) (attest.Quote, error) {
	if _, err := t.Identity(); err != nil {
		return attest.Quote{}, err
	}
	return t.word.Quote(nonce, pcrs...)
}

// PCR implements host.Attestor.
func (t *trust) PCR(pcr int) (attest.Digest, error) {
	if _, err := t.Identity(); err != nil {
		return attest.Digest{}, err
	}
	return t.tpm.PCR(pcr)
}

// EventLog implements host.Attestor.
func (t *trust) EventLog() ([]byte, error) {
	if _, err := t.Identity(); err != nil {
		return nil, err
	}
	return t.word.EventLog()
}

// Activate implements host.Attestor.
func (t *trust) Activate(c attest.Challenge) ([]byte, error) {
	if _, err := t.Identity(); err != nil {
		return nil, err
	}
	return t.tpm.Activate(c)
}

// A lateVault is the seal, once it is open.
type lateVault struct{ t *trust }

func (v lateVault) Seal(b []byte) ([]byte, error) {
	<-v.t.opened
	return v.t.vault.Seal(b)
}

func (v lateVault) Open(b []byte) ([]byte, bool, error) {
	<-v.t.opened
	return v.t.vault.Open(b)
}

// plain stands for a seal on a machine whose TPM has never sealed anything.
type plain struct{}

func (plain) Seal(b []byte) ([]byte, error)       { return b, nil }
func (plain) Open(b []byte) ([]byte, bool, error) { return b, false, nil }
