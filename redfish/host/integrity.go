package host

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Attestor proves what the agent's machine runs, by its TPM.
type Attestor interface {
	// Identity are the TPM and its keys. ErrStarting says that they are being read, any other error that there is no TPM that works.
	Identity() (Identity, error)
	// Quote signs the PCRs of the SHA-256 bank with the nonce.
	Quote(nonce []byte, pcrs ...int) (attest.Quote, error)
	// PCR reads one.
	PCR(pcr int) (attest.Digest, error)
	// EventLog returns what was measured since the machine's reset, in TCG's format.
	EventLog() ([]byte, error)
	// Activate answers a challenge, with which a verifier makes sure that the attestation key sits beside the endorsement key.
	Activate(attest.Challenge) ([]byte, error)
}

// A Certifier is an Attestor that keeps a certificate for its attestation key, by whoever owns the machine.
type Certifier interface {
	// Certify has Identity show the chain (DER) from now on, over restarts.
	Certify(chain [][]byte) error
}

// ErrStarting means that the machine's TPM is not ready yet.
var ErrStarting = errors.New("the TPM is not ready yet")

// Identity is a TPM and its keys.
type Identity struct {
	Properties     attest.Properties
	EndorsementKey attest.Key
	// Certificates is the chain of the attestation key (DER), its own first.
	Certificates [][]byte
}

const (
	integrityURI = "/redfish/v1/ComponentIntegrity"
	tpmURI       = cardURI + "/TrustedComponents/tpm"
	akURI        = tpmURI + "/Certificates/ak"
)

var trustedSchema = oem.Schema{
	Name: "BackdoorTrustedComponent", Version: "v1_0_0", Purpose: "How a verifier makes sure which TPM it is.",
	Objects: map[string]any{"TrustedComponent": trustedOEM{}},
	Actions: []oem.Action{{
		Name: "ActivateCredential", Bound: "TrustedComponent.v1_0_0.OemActions",
		Description: "Answers a challenge that only a TPM with both the endorsement key and the attestation key can answer (TPM2_ActivateCredential). The answer is CertInfo, in hexadecimal.",
		Parameters: []oem.Parameter{
			{Name: "CredentialBlob", Type: "Edm.String", Required: true, Description: "The TPMS_ID_OBJECT in Base64."},
			{Name: "Secret", Type: "Edm.String", Required: true, Description: "The encrypted seed in Base64."},
		},
	}},
}

type trustedOEM struct {
	EndorsementKey            string `json:"endorsementKey" doc:"The public half of the TPM's endorsement key (TCG's template for ECC P-256), in PEM."`
	EndorsementKeyFingerprint string `json:"endorsementKeyFingerprint" doc:"The SHA-256 of its SubjectPublicKeyInfo, in hexadecimal: what an owner pins."`
}

// activated is the answer of ActivateCredential.
type activated struct {
	CertInfo string `json:"CertInfo"`
}

// trusts reports whether the machine has a TPM, as far as is known: one that is not ready yet is there.
func (h *host) trusts() bool {
	if h.o.Attestor == nil {
		return false
	}
	_, err := h.o.Attestor.Identity()
	return err == nil || errors.Is(err, ErrStarting)
}

// tpm are the members of a collection of TPMs.
func (h *host) tpm(*service.Request) ([]string, error) {
	if !h.trusts() {
		return nil, nil
	}
	return []string{"tpm"}, nil
}

// identity is the TPM's, or why a request that needs it is refused.
func identity(a Attestor) (Identity, error) {
	id, err := a.Identity()
	switch {
	case errors.Is(err, ErrStarting):
		e := service.Because(503, "ServiceTemporarilyUnavailable", "The TPM is not ready yet. Retry in 1 seconds.", "1")
		e.Header = http.Header{"Retry-After": {"1"}}
		return id, e
	case err != nil:
		return id, service.ErrNotFound
	}
	return id, nil
}

// integrity are the resources with which a client makes sure what the agent's machine runs. Without a TPM the collection is there and
// empty: nothing can be proven. A TPM that is not ready yet is starting.
func (h *host) integrity() []service.Route {
	a := h.o.Attestor
	if a == nil {
		return []service.Route{{URI: integrityURI, Type: schema.TypeComponentIntegrityCollection, Name: "Component integrity", Members: service.Fixed()}}
	}
	if c, ok := a.(Certifier); ok {
		h.svc.Certify(akURI, func(chain []*x509.Certificate) error { return certify(a, c, chain) })
	}
	return []service.Route{
		{URI: integrityURI, Type: schema.TypeComponentIntegrityCollection, Name: "Component integrity", Members: h.tpm},
		{
			URI: integrityURI + "/tpm", Type: schema.TypeComponentIntegrity,
			Get: func(*service.Request) (schema.Object, error) {
				id, err := a.Identity()
				if errors.Is(err, ErrStarting) {
					return &schema.ComponentIntegrity{
						Resource: schema.Resource{Name: "Integrity of the agent", Description: "What the agent's machine has started, measured into its TPM"},
						Type:     "TPM", TypeVersion: "2.0", Enabled: true, TargetComponentURI: tpmURI, LastUpdated: schema.Time(h.started),
						Status: &schema.Status{State: schema.StateStarting},
					}, nil
				}
				if err != nil {
					return nil, service.ErrNotFound
				}
				out := &schema.ComponentIntegrity{
					Resource: schema.Resource{Name: "Integrity of the agent", Description: "What the agent's machine has started, measured into its TPM"},
					Type:     "TPM", TypeVersion: id.Properties.Family, Enabled: true, TargetComponentURI: tpmURI, LastUpdated: schema.Time(h.started),
					Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
					TPM: &schema.IntegrityTPM{
						NonceSizeBytesMaximum:  attest.MaxNonce,
						IdentityAuthentication: &schema.IntegrityKey{ComponentCertificate: schema.LinkTo(akURI)},
						MeasurementSet:         &schema.IntegrityPCRList{Measurements: []schema.IntegrityPCR{}},
					},
					Links: &schema.IntegrityProtected{ComponentsProtected: []schema.Link{{ID: managerURI}}},
				}
				for _, pcr := range []int{attest.ImagePCR, attest.IdentityPCR} {
					d, err := a.PCR(pcr)
					if err != nil {
						return nil, err
					}
					set := out.TPM.MeasurementSet
					set.Measurements = append(set.Measurements, schema.IntegrityPCR{PCR: pcr, Measurement: base64.StdEncoding.EncodeToString(d[:]), Algorithm: "TPM_ALG_SHA256"})
				}
				return out, nil
			},
			Actions: []service.Action{{
				Name: "ComponentIntegrity.TPMGetSignedMeasurements",
				Parameters: []service.Property{
					{Name: "Certificate", Kind: service.Object, Required: true},
					{Name: "PCRSelection", Kind: service.String, Required: true, Min: 1, Max: 64},
					{Name: "Scheme", Kind: service.String, Required: true, Min: 1, Max: 64},
					{Name: "Nonce", Kind: service.String, Max: 2 * 1024},
				},
				Do: func(_ *service.Request, v service.Values) (*service.Reply, error) {
					if _, err := identity(a); err != nil {
						return nil, err
					}
					return signedMeasurements(a, v)
				},
			}},
		},
		{URI: cardURI + "/TrustedComponents", Type: schema.TypeTrustedComponentCollection, Name: "Trusted components", Members: h.tpm},
		{
			URI: tpmURI, Type: schema.TypeTrustedComponent,
			Get: func(*service.Request) (schema.Object, error) {
				id, err := identity(a)
				if err != nil {
					return nil, err
				}
				own, err := oem.Object("BackdoorTrustedComponent.v1_0_0.TrustedComponent", trustedOEM{id.EndorsementKey.PEM(), id.EndorsementKey.Fingerprint().String()})
				if err != nil {
					return nil, err
				}
				return &schema.TrustedComponent{
					Resource: schema.Resource{Name: "TPM", Description: "The TPM of the agent's machine"},
					// Whether it is a chip of its own cannot be told from a TPM.
					Type: "Discrete", Manufacturer: strings.TrimRight(id.Properties.Manufacturer, " \x00"),
					FirmwareVersion: fmt.Sprintf("%d.%d.%d.%d", id.Properties.Firmware>>48, id.Properties.Firmware>>32&0xffff, id.Properties.Firmware>>16&0xffff, id.Properties.Firmware&0xffff),
					Certificates:    schema.LinkTo(tpmURI + "/Certificates"),
					TPM:             &schema.TrustedTPM{CapabilitiesVendorID: strings.TrimRight(id.Properties.Manufacturer, "\x00")},
					Status:          &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
					Links: &schema.TrustedLinks{
						ComponentIntegrity:  []schema.Link{{ID: integrityURI + "/tpm"}},
						ComponentsProtected: []schema.Link{{ID: managerURI}},
					},
					OEM: own,
				}, nil
			},
			Actions: []service.Action{
				{
					Name: "TrustedComponent.TPMGetEventLog",
					Do: func(*service.Request, service.Values) (*service.Reply, error) {
						if _, err := identity(a); err != nil {
							return nil, err
						}
						log, err := a.EventLog()
						if err != nil {
							return nil, err
						}
						return &service.Reply{Body: schema.EventLog{EventLog: base64.StdEncoding.EncodeToString(log)}}, nil
					},
				},
				{
					Name: "BackdoorTrustedComponent.ActivateCredential", OEM: true,
					Parameters: []service.Property{
						{Name: "CredentialBlob", Kind: service.String, Required: true, Min: 1, Max: 1024},
						{Name: "Secret", Kind: service.String, Required: true, Min: 1, Max: 1024},
					},
					Do: func(_ *service.Request, v service.Values) (*service.Reply, error) {
						var c attest.Challenge
						if _, err := identity(a); err != nil {
							return nil, err
						}
						var err error
						if c.Credential, err = parameter(v, "ActivateCredential", "CredentialBlob"); err != nil {
							return nil, err
						}
						if c.Secret, err = parameter(v, "ActivateCredential", "Secret"); err != nil {
							return nil, err
						}
						answer, err := a.Activate(c)
						if err != nil {
							return nil, service.Because(400, "ActionParameterValueError", "The TPM cannot answer the challenge: it was not made for its keys.", "CredentialBlob", "ActivateCredential")
						}
						return &service.Reply{Body: activated{hex.EncodeToString(answer)}}, nil
					},
				},
			},
		},
		{URI: tpmURI + "/Certificates", Type: schema.TypeCertificateCollection, Name: "Certificates of the TPM", Members: func(*service.Request) ([]string, error) {
			if _, err := identity(a); err != nil {
				return nil, err
			}
			return []string{"ak"}, nil
		}},
		{
			URI: akURI, Type: schema.TypeCertificate,
			Get: func(*service.Request) (schema.Object, error) {
				id, err := identity(a)
				if err != nil {
					return nil, err
				}
				leaf, err := x509.ParseCertificate(id.Certificates[0])
				if err != nil {
					return nil, err
				}
				return service.DescribeCertificate("Attestation key", id.Certificates, leaf, ""), nil
			},
		},
	}
}

// certify takes the certificate that the machine's owner has made for the attestation key. Whether he is trusted is for those to say who
// verify it.
func certify(a Attestor, c Certifier, chain []*x509.Certificate) error {
	id, err := identity(a)
	if err != nil {
		return err
	}
	now, err := x509.ParseCertificate(id.Certificates[0])
	if err != nil {
		return err
	}
	point, ok := now.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("the attestation key is a %T", now.PublicKey)
	}
	ak, err := attest.AttestationKey(point)
	if err != nil {
		return err
	}
	if err := attest.CheckCertificate(chain[0], ak); err != nil {
		return service.UnfitCertificate(err.Error())
	}
	var der [][]byte
	for _, cert := range chain {
		der = append(der, cert.Raw)
	}
	return c.Certify(der)
}

// parameter is a parameter in Base64.
func parameter(v service.Values, action, name string) ([]byte, error) {
	b, err := base64.StdEncoding.DecodeString(v.String(name))
	if err != nil {
		return nil, service.Because(400, "ActionParameterValueFormatError", "It is no Base64.", v.String(name), name, action)
	}
	return b, nil
}

func signedMeasurements(a Attestor, v service.Values) (*service.Reply, error) {
	const action = "TPMGetSignedMeasurements"
	wrong := func(name, value string, err error) error {
		return service.Because(400, "ActionParameterValueFormatError", sentence(err), value, name, action)
	}
	if link, ok := v["Certificate"].(map[string]any); !ok || link["@odata.id"] != akURI {
		return nil, wrong("Certificate", fmt.Sprint(v["Certificate"]), fmt.Errorf("the only attestation key is %s", akURI))
	}
	scheme, err := parameter(v, action, "Scheme")
	if err != nil {
		return nil, err
	}
	if err := attest.CheckScheme(scheme); err != nil {
		return nil, wrong("Scheme", v.String("Scheme"), err)
	}
	list, err := parameter(v, action, "PCRSelection")
	if err != nil {
		return nil, err
	}
	pcrs, err := attest.ParseSelection(list)
	if err != nil {
		return nil, wrong("PCRSelection", v.String("PCRSelection"), err)
	}
	var nonce []byte
	if v.Has("Nonce") {
		if nonce, err = hex.DecodeString(v.String("Nonce")); err != nil {
			return nil, wrong("Nonce", v.String("Nonce"), err)
		}
		if len(nonce) > attest.MaxNonce {
			return nil, wrong("Nonce", v.String("Nonce"), fmt.Errorf("it has %d bytes, and at most %d fit", len(nonce), attest.MaxNonce))
		}
	} else {
		nonce = make([]byte, attest.MaxNonce)
		rand.Read(nonce)
	}
	q, err := a.Quote(nonce, pcrs...)
	if err != nil {
		return nil, err
	}
	b, err := q.MarshalBinary()
	if err != nil {
		return nil, err
	}
	return &service.Reply{Body: schema.SignedMeasurements{SignedMeasurements: base64.StdEncoding.EncodeToString(b)}}, nil
}
