package attest_test

import (
	"encoding/hex"
	"errors"
	"testing"

	"github.com/backdoor-rhs/backdoor/boot/attest"
)

// Evidence of version 1, as agents have sent it. Do not change this test: verifiers have to go on understanding them.

// goldenQuote is a quote of PCRs 11 and 15 by swtpm 0.7.1, as TPMGetSignedMeasurements carries it, with the nonce goldenNonce, by the
// attestation key goldenKey.
const goldenQuote = "0091ff54434780180022000b56cb52082955bf8f2fd6b3f552d4be308f40d57f6f1b506a5c5dc9604f06da16002061206e6f6e6365206f662061207665726966" +
	"6965722c2033322062797465732e000000000000000c000000010000000001201910230016363600000001000b030088000020ec66ef3a3583a5e85c048c8e8e" +
	"1b9a2e5864a3b71c943ca8ac6f66dd0e674c540018000b00200a5fa3255824a645db963e00a1032a14e26837d7f4c73635377c0b9bf69926590020a3c257db97" +
	"88b20b5abd9a2e33ac3fa96b005b8afba6331bd99405b69b1b1e73"

const goldenNonce = "a nonce of a verifier, 32 bytes."

const goldenKey = `-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEomxok5IV3I1Z/jn/OYIherXY5A8p
Ncy2wVIIL+mkAVsILpk6FrWiNNp+kpBG5gxqZhoTXa3KiEtxBbr4FhAZvQ==
-----END PUBLIC KEY-----
`

// goldenLog is the event log: an image, and the TLS key with the SHA-256 05 00 … 00.
const goldenLog = "000000000300000000000000000000000000000000000000000000002100000053706563204944204576656e743033000000000000020002010000000b002000" +
	"000b0000000d000000010000000b002081a1cfd3a09393ce34f567ed5faec9dd75a09aeacd3c64e0be1fb8ded999b8420000006261636b646f6f72206d616e69" +
	"666573740a7b2270726f64756374223a226261636b646f6f72222c2276657273696f6e223a22312e30222c2265706f6368223a337d0b0000000d000000010000" +
	"000b006923dd1bc0460082c5d55a831908c24a282860b7f1cd6c2b79cf1bc8857c639c140000006261636b646f6f722070617274206b65726e656c0b0000000d" +
	"000000010000000b0009e6c018d2c8c4903308613dd1b72484d57eadf12ec50ddc8f52e5accce470f2140000006261636b646f6f72207061727420696e697472" +
	"640b0000000d000000010000000b00008f0747f4e27c8462baa991a538025bcc2dd143e78422f1afbdfcd9e757a20f150000006261636b646f6f722070617274" +
	"20636d646c696e650f00000006000000010000000b00336747a209efd041659c20e4c8f0a95571f13e3c3b699f0809fdadbea1fa739f4d0000006261636b646f" +
	"6f7220746c7320303530303030303030303030303030303030303030303030303030303030303030303030303030303030303030303030303030303030303030" +
	"30303030303030"

func TestGoldenEvidence(t *testing.T) {
	point, err := attest.ParsePublicKey(goldenKey)
	if err != nil {
		t.Fatal(err)
	}
	e := attest.Evidence{Nonce: []byte(goldenNonce), PeerKey: attest.Digest{5}}
	if e.AK, err = attest.AttestationKey(point); err != nil {
		t.Fatal(err)
	}
	wire, err := hex.DecodeString(goldenQuote)
	if err != nil {
		t.Fatal(err)
	}
	if e.Quote, err = attest.ParseQuote(wire); err != nil {
		t.Fatal(err)
	}
	if e.Log, err = hex.DecodeString(goldenLog); err != nil {
		t.Fatal(err)
	}
	p := attest.Policy{Keys: []attest.Digest{e.AK.Fingerprint()}, Epoch: 3}
	if r, err := attest.Verify(e, p); err != nil || r.Product != "backdoor" || r.Version != "1.0" || r.Epoch != 3 {
		t.Errorf("Verify() = %+v, %v", r, err)
	}
	for i := range wire {
		bad := append([]byte(nil), wire...)
		bad[i] ^= 1
		q, err := attest.ParseQuote(bad)
		if err != nil {
			continue
		}
		spoiled := e
		spoiled.Quote = q
		if _, err := attest.Verify(spoiled, p); err == nil {
			t.Errorf("Verify() with byte %d of the quote changed: no error", i)
		}
	}
	e.PeerKey = attest.Digest{6}
	var differs *attest.MismatchError
	if _, err := attest.Verify(e, p); !errors.As(err, &differs) {
		t.Errorf("Verify() with another TLS key = %v; want a mismatch", err)
	}
}
