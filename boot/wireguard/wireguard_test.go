package wireguard

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestKeys: the pair of RFC 7748, section 6.1, and a key file that is made once and kept.
func TestKeys(t *testing.T) {
	private := Key{0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
		0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a}
	if got, want := private.Public().String(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="; got != want {
		t.Errorf("public key %s; want %s", got, want)
	}
	path := filepath.Join(t.TempDir(), "state", "key")
	a, err := LoadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := LoadKey(path)
	if err != nil || a != b || a == (Key{}) {
		t.Errorf("the key is %v, and then %v, %v", a, b, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", st.Mode(), err)
	}
	os.WriteFile(path, []byte("no key\n"), 0o600)
	if _, err := LoadKey(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a file without a key: %v", err)
	}
}

func TestValidate(t *testing.T) {
	good := `{"name": "wg0", "privateKeyFile": "key", "listenPort": 51820, "addresses": ["10.80.0.1/24"],
		"peers": [{"publicKey": "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=", "endpoint": "192.0.2.1:51820", "allowedIPs": ["10.80.0.2/32"]}]}`
	for _, tt := range []struct{ old, new, want string }{
		{"", "", ""},
		{`"wg0"`, `"a/b"`, "name"},
		{`"wg0"`, `"a-name-that-is-too-long"`, "name"},
		{`"key"`, `""`, "privateKeyFile"},
		{`["10.80.0.1/24"]`, `[]`, "addresses"},
		{`["10.80.0.2/32"]`, `[]`, "allowedIPs"},
		{`"10.80.0.2/32"`, `"10.80.0.2/32", "10.80.0.2/32"`, "another's"},
		{"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "publicKey"},
	} {
		var c Config
		if err := json.Unmarshal([]byte(strings.Replace(good, tt.old, tt.new, 1)), &c); err != nil {
			t.Fatal(err)
		}
		if err := c.Validate(); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s for %s: %v; want %q", tt.new, tt.old, err, tt.want)
		}
	}
}

// TestSockaddr: as the kernel's headers have them (linux/in.h, linux/in6.h).
func TestSockaddr(t *testing.T) {
	v4, v6 := sockaddr(netip.MustParseAddrPort("192.0.2.1:51820")), sockaddr(netip.MustParseAddrPort("[fd00::1]:51820"))
	if len(v4) != 16 || string(v4[2:8]) != "\xca\x6c\xc0\x00\x02\x01" || len(v6) != 28 || string(v6[2:4]) != "\xca\x6c" || v6[8] != 0xfd || v6[23] != 1 {
		t.Errorf("% x\n% x", v4, v6)
	}
}

func FuzzPeers(f *testing.F) {
	f.Add([]byte{36, 0, 8, 128, 32, 0, 0, 128, 12, 0, 7, 0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 0, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 0, 6, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parsePeers(b); err == nil && len(p) > len(b)/4 {
			t.Fatalf("%d peers in %d bytes", len(p), len(b))
		}
	})
}
