package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ErrWrongImage means that a secret was sealed to other images than the one that runs.
var ErrWrongImage = errors.New("it is sealed to other images than the one that runs")

// maxSealed is the longest secret in bytes: MAX_SYM_DATA of the PC Client profile.
const maxSealed = 128

// maxImages is the number of images that one secret can be sealed to: TPM2_PolicyOR takes eight branches.
const maxImages = 8

// Sealed is a secret that only one TPM can open, and only while one of some images runs.
type Sealed struct {
	Version int      `json:"version"` // 1
	Public  []byte   `json:"public"`  // TPM2B_PUBLIC
	Private []byte   `json:"private"` // TPM2B_PRIVATE
	PCRs    []Digest `json:"pcrs"`    // the values of ImagePCR
}

// ParseSealed reads what json.Marshal made of a Sealed.
func ParseSealed(b []byte) (Sealed, error) {
	var s Sealed
	if len(b) > 16<<10 {
		return s, fmt.Errorf("a sealed secret of %d bytes", len(b))
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return Sealed{}, fmt.Errorf("read a sealed secret: %w", err)
	}
	if s.Version != 1 || len(s.PCRs) == 0 || len(s.PCRs) > maxImages {
		return Sealed{}, fmt.Errorf("read a sealed secret: version %d with %d images is not known", s.Version, len(s.PCRs))
	}
	return s, nil
}

// branch is the policy digest "ImagePCR has that value" (TPM 2.0 library, part 3, TPM2_PolicyPCR).
func branch(pcr Digest) ([]byte, error) {
	c, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(pcr[:])
	err = tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: sum[:]}, Pcrs: selection(ImagePCR)}.Update(c)
	return c.Hash().Digest, err
}

// policy is the digest of "ImagePCR has one of these values", and its branches.
func policy(pcrs []Digest) (digest []byte, branches tpm2.TPMLDigest, err error) {
	for _, d := range pcrs {
		b, err := branch(d)
		if err != nil {
			return nil, branches, err
		}
		branches.Digests = append(branches.Digests, tpm2.TPM2BDigest{Buffer: b})
	}
	if len(branches.Digests) == 1 { // TPM2_PolicyOR wants two at least
		branches.Digests = append(branches.Digests, branches.Digests[0])
	}
	c, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, branches, err
	}
	err = tpm2.PolicyOr{PHashList: branches}.Update(c)
	return c.Hash().Digest, branches, err
}

// Seal seals a secret of at most 128 bytes to this TPM and to the images with those values of [ImagePCR] (see [Image.PCR]).
// Sealing it again to more or others is how a secret outlives an update: before the new image is started, to both.
func (t *TPM) Seal(secret []byte, pcrs ...Digest) (Sealed, error) {
	if len(secret) == 0 || len(secret) > maxSealed {
		return Sealed{}, fmt.Errorf("seal: a secret of %d bytes; want 1 to %d", len(secret), maxSealed)
	}
	if len(pcrs) == 0 || len(pcrs) > maxImages {
		return Sealed{}, fmt.Errorf("seal to %d images; want 1 to %d", len(pcrs), maxImages)
	}
	digest, _, err := policy(pcrs)
	if err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Sealed{Version: 1, PCRs: slices.Clone(pcrs)}
	err = t.withPrimary(tpm2.TPMRHOwner, tpm2.ECCSRKTemplate, func(srk primary) error {
		parent := srk.auth()
		// The secret crosses the wires between processor and TPM encrypted to the storage root key.
		parent.Auth = tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Auth(nil), tpm2.AESEncryption(128, tpm2.EncryptIn), tpm2.Salted(srk.handle, srk.public))
		r, err := tpm2.Create{
			ParentHandle: parent,
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret}),
			}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				// Without UserWithAuth the policy is the only way.
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
				AuthPolicy:       tpm2.TPM2BDigest{Buffer: digest},
			}),
		}.Execute(t.t)
		if err == nil {
			s.Public, s.Private = tpm2.Marshal(r.OutPublic), tpm2.Marshal(r.OutPrivate)
		}
		return err
	})
	if err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	return s, nil
}

// Unseal opens a secret. [ErrWrongImage] says that the running image is none of those that it was sealed to.
func (t *TPM) Unseal(s Sealed) (secret []byte, err error) {
	defer func() {
		if recover() != nil { // go-tpm's decoder, on lengths that do not fit
			secret, err = nil, errors.New("unseal: the sealed secret is malformed")
		}
	}()
	_, branches, err := policy(s.PCRs)
	if err != nil {
		return nil, fmt.Errorf("unseal: %w", err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](s.Public)
	if err != nil {
		return nil, fmt.Errorf("unseal: %w", err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](s.Private)
	if err != nil {
		return nil, fmt.Errorf("unseal: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	err = t.withPrimary(tpm2.TPMRHOwner, tpm2.ECCSRKTemplate, func(srk primary) error {
		loaded, err := tpm2.Load{ParentHandle: srk.auth(), InPrivate: *private, InPublic: *public}.Execute(t.t)
		if err != nil {
			return fmt.Errorf("load it, which another TPM cannot: %w", err)
		}
		fulfil := func(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(ImagePCR)}).Execute(t); err != nil {
				return err
			}
			_, err := tpm2.PolicyOr{PolicySession: session, PHashList: branches}.Execute(t)
			return err
		}
		r, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, fulfil,
			tpm2.AESEncryption(128, tpm2.EncryptOut), tpm2.Salted(srk.handle, srk.public))}}.Execute(t.t)
		switch {
		case errors.Is(err, tpm2.TPMRCValue), errors.Is(err, tpm2.TPMRCPolicyFail):
			err = ErrWrongImage // TPM2_PolicyOR found no branch
		case err == nil:
			secret = r.OutData.Buffer
		}
		_, ferr := tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(t.t)
		return errors.Join(err, ferr)
	})
	if err != nil {
		return nil, fmt.Errorf("unseal: %w", err)
	}
	return secret, nil
}
