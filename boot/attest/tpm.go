package attest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
)

// ErrNoTPM means that the machine has no TPM 2.0, which was found out for certain.
var ErrNoTPM = errors.New("the machine has no TPM")

// DevicePath is the kernel's TPM with its resource manager.
const DevicePath = "/dev/tpmrm0"

// A TPM is an open TPM 2.0. Its methods are safe for concurrent use; they take some tens of milliseconds each.
type TPM struct {
	mu sync.Mutex // guards t: commands do not interleave
	t  transport.TPMCloser
}

// Open opens the machine's TPM; [ErrNoTPM] if there is none.
func Open() (*TPM, error) {
	if _, err := os.Stat(DevicePath); errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoTPM
	}
	t, err := linuxtpm.Open(DevicePath)
	if err != nil {
		return nil, fmt.Errorf("open the TPM: %w", err)
	}
	return New(t), nil
}

// New makes a TPM of a connection to one.
func New(t transport.TPMCloser) *TPM { return &TPM{t: t} }

// Close closes the connection.
func (t *TPM) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.t.Close()
}

// Send sends one command as it is and returns the response, so that a TPM can stand where go-tpm wants a transport.
func (t *TPM) Send(command []byte) ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.t.Send(command)
}

// Properties are what a TPM says of itself.
type Properties struct {
	Manufacturer string // the TCG's vendor ID, such as "IBM " or "IFX "
	Firmware     uint64
	Family       string // "2.0"
}

// Properties reads them.
func (t *TPM) Properties() (Properties, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	const n = 0x13 // TPM2_PT_FAMILY_INDICATOR … TPM2_PT_FIRMWARE_VERSION_2
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTFamilyIndicator), PropertyCount: n}.Execute(t.t)
	if err != nil {
		return Properties{}, fmt.Errorf("read the TPM's properties: %w", err)
	}
	list, err := r.CapabilityData.Data.TPMProperties()
	if err != nil {
		return Properties{}, fmt.Errorf("read the TPM's properties: %w", err)
	}
	text := func(v uint32) string { return string([]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}) }
	var p Properties
	for _, q := range list.TPMProperty {
		switch q.Property {
		case tpm2.TPMPTFamilyIndicator:
			p.Family = text(q.Value)[:3]
		case tpm2.TPMPTManufacturer:
			p.Manufacturer = text(q.Value)
		case tpm2.TPMPTFirmwareVersion1:
			p.Firmware |= uint64(q.Value) << 32
		case tpm2.TPMPTFirmwareVersion2:
			p.Firmware |= uint64(q.Value)
		}
	}
	return p, nil
}

// Extend measures an event into its PCR.
func (t *TPM) Extend(e Event) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{
			HashAlg: tpm2.TPMAlgSHA256, Digest: e.Digest[:],
		}}},
	}.Execute(t.t)
	if err != nil {
		return fmt.Errorf("extend PCR %d: %w", e.PCR, err)
	}
	return nil
}

// PCR reads a PCR of the SHA-256 bank.
func (t *TPM) PCR(pcr int) (Digest, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, err := tpm2.PCRRead{PCRSelectionIn: selection(pcr)}.Execute(t.t)
	if err == nil && (len(r.PCRValues.Digests) != 1 || len(r.PCRValues.Digests[0].Buffer) != len(Digest{})) {
		err = errors.New("the TPM has no SHA-256 bank")
	}
	if err != nil {
		return Digest{}, fmt.Errorf("read PCR %d: %w", pcr, err)
	}
	return Digest(r.PCRValues.Digests[0].Buffer), nil
}

func selection(pcrs ...int) tpm2.TPMLPCRSelection {
	var set [PCRs / 8]byte
	for _, p := range pcrs {
		set[p/8] |= 1 << (p % 8)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: set[:]}}}
}

// akTemplate is the attestation key: a restricted ECDSA P-256 signing key. It is a primary key of the endorsement
// hierarchy, so the TPM makes the same one from its seed each time, until TPM2_ChangeEPS, and a quote shows the counts of
// resets and restarts as they are (TPM 2.0 library, part 1, section 36.6).
func akTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)}, Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
		}),
	}
}

// A primary is a primary key while it is loaded.
type primary struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// withPrimary makes a primary key, calls f, and unloads it. t.mu is held.
func (t *TPM) withPrimary(hierarchy tpm2.TPMHandle, template tpm2.TPMTPublic, f func(primary) error) error {
	r, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(template)}.Execute(t.t)
	if err != nil {
		return fmt.Errorf("make a primary key: %w", err)
	}
	public, err := r.OutPublic.Contents()
	if err == nil {
		err = f(primary{r.ObjectHandle, r.Name, *public})
	}
	_, ferr := tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(t.t)
	return errors.Join(err, ferr)
}

func (p primary) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: p.handle, Name: p.name, Auth: tpm2.PasswordAuth(nil)}
}

// EndorsementKey returns the TPM's endorsement key, made from TCG's template for ECC P-256 (L-2): it is the same for as
// long as the TPM has the same seed.
func (t *TPM) EndorsementKey() (Key, error) { return t.public(tpm2.ECCEKTemplate) }

// AttestationKey returns the key that signs this TPM's quotes.
func (t *TPM) AttestationKey() (Key, error) { return t.public(akTemplate()) }

func (t *TPM) public(template tpm2.TPMTPublic) (k Key, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err = t.withPrimary(tpm2.TPMRHEndorsement, template, func(p primary) (err error) {
		k, err = newKey(p.public)
		return err
	})
	return k, err
}

// MaxNonce is the longest nonce of a quote in bytes: what fits the qualifying data of a SHA-256 TPM.
const MaxNonce = 32

// Quote signs the values of the PCRs, with the nonce, by the attestation key.
func (t *TPM) Quote(nonce []byte, pcrs ...int) (Quote, error) {
	if len(nonce) > MaxNonce {
		return Quote{}, fmt.Errorf("a nonce of %d bytes; at most %d fit", len(nonce), MaxNonce)
	}
	for _, p := range pcrs {
		if p < 0 || p >= PCRs {
			return Quote{}, fmt.Errorf("there is no PCR %d", p)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var q Quote
	err := t.withPrimary(tpm2.TPMRHEndorsement, akTemplate(), func(ak primary) error {
		r, err := tpm2.Quote{
			SignHandle: ak.auth(), QualifyingData: tpm2.TPM2BData{Buffer: nonce},
			InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: selection(pcrs...),
		}.Execute(t.t)
		if err != nil {
			return err
		}
		q = Quote{Attested: r.Quoted.Bytes(), Signature: tpm2.Marshal(r.Signature)}
		return nil
	})
	if err != nil {
		return Quote{}, fmt.Errorf("quote: %w", err)
	}
	return q, nil
}

// Activate answers a challenge: it returns the secret if the challenge was made for this TPM's endorsement key and its
// attestation key.
func (t *TPM) Activate(c Challenge) (secret []byte, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err = t.withPrimary(tpm2.TPMRHEndorsement, tpm2.ECCEKTemplate, func(ek primary) error {
		return t.withPrimary(tpm2.TPMRHEndorsement, akTemplate(), func(ak primary) error {
			r, err := tpm2.ActivateCredential{
				ActivateHandle: ak.auth(),
				KeyHandle:      tpm2.AuthHandle{Handle: ek.handle, Name: ek.name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, ekPolicy)},
				CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.Credential},
				Secret:         tpm2.TPM2BEncryptedSecret{Buffer: c.Secret},
			}.Execute(t.t)
			if err == nil {
				secret = r.CertInfo.Buffer
			}
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("activate the credential: %w", err)
	}
	return secret, nil
}

// ekPolicy fulfils the policy of TCG's template: the endorsement hierarchy's authorisation, which is empty.
func ekPolicy(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: session, NonceTPM: nonce,
	}.Execute(t)
	return err
}

// Sign signs text by the attestation key, which signs what does not look like one of the TPM's own statements. It is how
// the key signs its own certificate. At most 1024 bytes.
func (t *TPM) sign(text []byte) (sig []byte, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h, err := tpm2.Hash{Data: tpm2.TPM2BMaxBuffer{Buffer: text}, HashAlg: tpm2.TPMAlgSHA256, Hierarchy: tpm2.TPMRHEndorsement}.Execute(t.t)
	if err != nil {
		return nil, fmt.Errorf("hash in the TPM: %w", err)
	}
	err = t.withPrimary(tpm2.TPMRHEndorsement, akTemplate(), func(ak primary) error {
		r, err := tpm2.Sign{
			KeyHandle: ak.auth(), Digest: h.OutHash, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, Validation: h.Validation,
		}.Execute(t.t)
		if err != nil {
			return err
		}
		sig, err = derSignature(r.Signature)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("sign in the TPM: %w", err)
	}
	return sig, nil
}
