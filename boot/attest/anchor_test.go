package attest_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/attest/attesttest"
)

// TestAnchorZeros wants that any secret will do: a random one of 32 bytes has a zero in it one time in eight.
func TestAnchorZeros(t *testing.T) {
	for name, zero := range map[string]int{"first": 0, "in the middle": 16, "last": 31} {
		t.Run(name, func(t *testing.T) {
			tpm, _ := attesttest.Start(t, t.TempDir())
			secret := bytes.Repeat([]byte{7}, 32)
			secret[zero] = 0
			one := sha256.Sum256([]byte("1"))
			a := tpm.Anchor(secret, []byte("the owner's key"))
			if err := a.Write(one, one); err != nil {
				t.Fatal(err)
			}
			if is, _, ok, err := a.Read(); is != one || !ok || err != nil {
				t.Errorf("Read() = %x, %v, %v", is, ok, err)
			}
		})
	}
}

// TestAnchor wants that an anchor keeps what was written over a reset, that nobody without the secret reads it as his own or writes it, and
// that one which somebody else has made in its place is told.
func TestAnchor(t *testing.T) {
	dir := t.TempDir()
	tpm, off := attesttest.Start(t, dir)
	secret, owner := bytes.Repeat([]byte{7}, 32), []byte("the owner's key")
	one, two := sha256.Sum256([]byte("1")), sha256.Sum256([]byte("2"))

	a := tpm.Anchor(secret, owner)
	if _, _, ok, err := a.Read(); ok || err != nil {
		t.Fatalf("Read() of a TPM that has none = %v, %v", ok, err)
	}
	if err := a.Write(one, two); err != nil {
		t.Fatal(err)
	}
	// The anchor comes before any counter: it must not be in the way of the security epoch, which starts at 1.
	if err := tpm.RaiseEpoch(1); err != nil {
		t.Fatal(err)
	}
	off()
	tpm, _ = attesttest.Start(t, dir)
	a = tpm.Anchor(secret, owner)
	if is, next, ok, err := a.Read(); is != one || next != two || !ok || err != nil {
		t.Fatalf("Read() after a reset = %x, %x, %v, %v", is, next, ok, err)
	}
	if err := a.Write(two, two); err != nil {
		t.Fatal(err)
	}

	others := map[string]*attest.Anchor{
		"another secret": tpm.Anchor(bytes.Repeat([]byte{8}, 32), owner),
		"another owner":  tpm.Anchor(secret, []byte("a stranger's key")),
	}
	for name, x := range others {
		if _, _, ok, err := x.Read(); ok || !errors.Is(err, attest.ErrNotOurs) {
			t.Errorf("%s: Read() = %v, %v; want ErrNotOurs", name, ok, err)
		}
		if err := x.Write(one, one); !errors.Is(err, attest.ErrNotOurs) {
			t.Errorf("%s: Write() = %v; want ErrNotOurs", name, err)
		}
	}
	if is, _, ok, err := a.Read(); is != two || !ok || err != nil {
		t.Fatalf("Read() after others have tried = %x, %v, %v", is, ok, err)
	}

	// Who may use the owner hierarchy puts another one there.
	const index tpm2.TPMHandle = 0x01800bd1
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, NVIndex: tpm2.NamedHandle{Handle: index, Name: pub.NVName},
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, ok, err := a.Read(); ok || err != nil {
		t.Errorf("Read() of what was removed = %v, %v", ok, err)
	}
	if err := others["another secret"].Write(one, one); err != nil {
		t.Fatal(err)
	}
	if _, _, ok, err := a.Read(); ok || !errors.Is(err, attest.ErrNotOurs) {
		t.Errorf("Read() of another's = %v, %v; want ErrNotOurs", ok, err)
	}
}
