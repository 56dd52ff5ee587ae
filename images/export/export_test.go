package export

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/images/bundler"
)

func content(name string, b []byte) bundle.Content {
	return bundle.Content{Name: name, From: bytes.NewReader(b), Size: int64(len(b))}
}

// testBundle makes a bundle whose kernel looks like an arm64 Image.
func testBundle(t *testing.T) (*bundle.Image, []bundle.Content) {
	t.Helper()
	key, roots, err := bundler.Development(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	kernel := make([]byte, 4001)
	copy(kernel[56:], "ARMd")
	parts := []bundle.Content{content(bundle.PartKernel, kernel), content(bundle.PartInitramfs, []byte("initramfs"))}
	now := time.Now().UTC().Truncate(time.Second)
	e, err := bundle.Describe(bundle.Manifest{
		Format: 1, Product: "backdoor", Machine: "dpu-arm64", Version: "1.0", Epoch: 1, Released: now, Expires: now.AddDate(1, 0, 0), CommandLine: "console=hvc0",
	}, parts)
	if err == nil {
		err = e.Sign(crypto.Signer(ed25519.PrivateKey(key)))
	}
	var out bytes.Buffer
	if err == nil {
		err = bundle.Write(&out, roots, e, parts)
	}
	if err != nil {
		t.Fatal(err)
	}
	root, err := bundle.ReadRoots(roots)
	if err != nil {
		t.Fatal(err)
	}
	img, err := bundle.OpenAt(bytes.NewReader(out.Bytes()), bundle.Policy{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return img, parts
}

// golden is a stream with the string "abc" as boot arguments: header and image as the format's description has them, worked out by hand.
var golden = []byte{
	0x42, 0x66, 0x02, 0x13, 0x21, 0x00, 0x30, 59, 3, 0, 0, 0, 0x74, 0x5f, 0x2a, 0xeb, 0, 0, 0, 0, 0, 0, 0, 0,
	'a', 'b', 'c', 0, 0, 0, 0, 0,
}

func TestBFB(t *testing.T) {
	base, err := readBFB(content("", golden))
	if err != nil || len(base) != 1 || base[0].id != bfbArguments {
		t.Fatalf("the golden stream: %+v, %v", base, err)
	}
	img, parts := testBundle(t)
	var out bytes.Buffer
	if err := BFB(&out, content("", golden), img, parts); err != nil {
		t.Fatal(err)
	}
	if path := os.Getenv("BFB"); path != "" {
		if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all, err := readBFB(content("", out.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	var ids []int
	for _, b := range all {
		ids = append(ids, b.id)
		if b.id == bfbArguments {
			got := make([]byte, b.content.Size)
			if _, err := b.content.From.ReadAt(got, 0); err != nil || string(got) != "console=hvc0 initrd=initramfs" {
				t.Errorf("boot arguments %q, %v", got, err)
			}
		}
	}
	if want := []int{57, 58, 59, 62, 63}; len(ids) != len(want) || ids[0] != 57 || ids[4] != 63 {
		t.Errorf("images %v; want %v", ids, want)
	}
	if err := BFB(&out, content("", golden), img, []bundle.Content{content(bundle.PartKernel, bytes.Repeat([]byte("MZ"), 100))}); err == nil {
		t.Error("a kernel of another kind was taken")
	}
	for _, bad := range [][]byte{golden[:20], golden[:30], append(bytes.Clone(golden), 1)} {
		if _, err := readBFB(content("", bad)); err == nil {
			t.Errorf("a stream of %d bytes was taken", len(bad))
		}
	}
}

func FuzzBFB(f *testing.F) {
	f.Add(golden)
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := readBFB(content("", b))
		if err != nil && all != nil {
			t.Fatal("images beside an error")
		}
	})
}

// TestOpenBMC checks the tarball with tar and openssl.
func TestOpenBMC(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var out bytes.Buffer
	if err := OpenBMC(&out, content("", bytes.Repeat([]byte("flash"), 10_000)), "evb-ast2600", "1.0", time.Unix(1e9, 0), key); err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"x.tar": out.Bytes(), "system.pub": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		b, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, b)
		}
		return string(b)
	}
	run("tar", "xf", "x.tar")
	for _, f := range []string{"image-bmc", "MANIFEST", "publickey"} {
		run("openssl", "dgst", "-sha256", "-verify", "system.pub", "-signature", f+".sig", f)
	}
	b, err := os.ReadFile(filepath.Join(dir, "MANIFEST"))
	if err != nil || !strings.Contains(string(b), "MachineName=evb-ast2600\n") {
		t.Errorf("MANIFEST %q, %v", b, err)
	}
	if err := OpenBMC(&out, content("", nil), "a\nb", "1.0", time.Now(), key); err == nil {
		t.Error("a machine's name of two lines was taken")
	}
}
