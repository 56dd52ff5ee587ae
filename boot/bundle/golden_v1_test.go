package bundle

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"os"
	"testing"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

// Do not change this test, nor testdata/v1.bundle: they are what version 1 of the format is, and fleets hold such files and such slots.

func TestGoldenV1(t *testing.T) {
	file, err := os.ReadFile("testdata/v1.bundle")
	if err != nil {
		t.Fatal(err)
	}
	made, first, second := testBundle(t, testManifest(), testParts(300, 20))
	if !bytes.Equal(made, file) {
		t.Error("this program writes another file than version 1 did")
	}
	for _, root := range []Root{first, second} {
		got, err := through(bytes.NewReader(file), testPolicy(root))
		if err != nil || !bytes.Equal(got, file) {
			t.Errorf("under key set %d: %v", root.Version, err)
		}
	}
	roots, man, m, parts, err := Read(bytes.NewReader(file))
	if err != nil || len(roots) != 2 || len(man.Signatures) != 2 || len(parts) != 2 || m.Version != "1.4.0" || m.Machine != "dpu-arm64" || m.Epoch != 3 ||
		m.MinLoader != 1 || m.CommandLine != "console=ttyAMA0 quiet" || m.Parts[1].Size != 20 {
		t.Errorf("manifest %+v, %v", m, err)
	}
}

// dsseKey is a key for the other implementation.
type dsseKey struct{ Key }

func (k dsseKey) KeyID() (string, error)   { return k.ID, nil }
func (k dsseKey) Public() crypto.PublicKey { return ed25519.PublicKey(k.Key.Public) }
func (k dsseKey) Verify(_ context.Context, data, sig []byte) error {
	if !ed25519.Verify(k.Key.Public, data, sig) {
		return os.ErrInvalid
	}
	return nil
}

// TestOtherImplementation has go-securesystemslib, which in-toto and TUF verify DSSE with, verify our envelopes by their JSON.
func TestOtherImplementation(t *testing.T) {
	b, first, second := testBundle(t, testManifest(), testParts(300, 20))
	roots, man, _, _, err := Read(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		e         Envelope
		root      Root
		role      Role
		threshold int
	}{
		"manifest":       {man, second, second.Release, 2},
		"first key set":  {roots[0], first, first.Root, 2},
		"second by old":  {roots[1], first, first.Root, 2},
		"second by self": {roots[1], second, second.Root, 2},
	} {
		text, err := json.Marshal(tc.e)
		if err != nil {
			t.Fatal(err)
		}
		var e dsse.Envelope
		if err := json.Unmarshal(text, &e); err != nil {
			t.Fatal(err)
		}
		var keys []dsse.Verifier
		for _, id := range tc.role.Keys {
			keys = append(keys, dsseKey{Key{id, tc.root.key(id)}})
		}
		v, err := dsse.NewMultiEnvelopeVerifier(tc.threshold, keys...)
		if err != nil {
			t.Fatal(err)
		}
		if accepted, err := v.Verify(context.Background(), &e); err != nil || len(accepted) < tc.threshold {
			t.Errorf("%s: %d keys, %v", name, len(accepted), err)
		}
		e.Payload = e.Payload[:len(e.Payload)-4]
		if _, err := v.Verify(context.Background(), &e); err == nil {
			t.Errorf("%s: the other implementation takes anything", name)
		}
	}
}
