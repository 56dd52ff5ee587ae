package attest

import (
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Scheme is the signing scheme of quotes, as TPMT_SIG_SCHEME: what Redfish's TPMGetSignedMeasurements asks for.
func Scheme() []byte {
	return tpm2.Marshal(tpm2.TPMTSigScheme{
		Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256}),
	})
}

// CheckScheme refuses every scheme but that of [Scheme], and TPM_ALG_NULL, which leaves it to the key.
func CheckScheme(b []byte) error {
	null := []byte{0, 0x10}
	if string(b) != string(Scheme()) && string(b) != string(null) {
		return fmt.Errorf("the scheme %x is not %x (ECDSA with SHA-256), which is the key's", b, Scheme())
	}
	return nil
}

// Selection is a selection of SHA-256 PCRs as TPML_PCR_SELECTION.
func Selection(pcrs ...int) []byte { return tpm2.Marshal(selection(pcrs...)) }

// ParseSelection reads a TPML_PCR_SELECTION that selects SHA-256 PCRs, one at least, in one list.
func ParseSelection(b []byte) ([]int, error) {
	// uint32 count, then each: uint16 hash, uint8 size, bytes (TPM 2.0 library, part 2, section 10.9.7).
	if len(b) < 7 || b[0]|b[1]|b[2] != 0 || b[3] != 1 {
		return nil, errors.New("want one selection of PCRs")
	}
	if hash := int(b[4])<<8 | int(b[5]); hash != algSHA256 {
		return nil, fmt.Errorf("PCRs of algorithm %#x: want SHA-256, %#x", hash, algSHA256)
	}
	set := b[7:]
	if int(b[6]) != len(set) || len(set) > PCRs/8 {
		return nil, fmt.Errorf("a bit map of %d bytes, said to have %d: want at most %d", len(set), b[6], PCRs/8)
	}
	var pcrs []int
	for i := range 8 * len(set) {
		if set[i/8]&(1<<(i%8)) != 0 {
			pcrs = append(pcrs, i)
		}
	}
	if len(pcrs) == 0 {
		return nil, errors.New("no PCR is selected")
	}
	return pcrs, nil
}
