package early

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestModulesFor(t *testing.T) {
	table, err := parseAliases(strings.NewReader(`# Aliases extracted from modules themselves.
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
alias virtio:d00000001v* virtio_net
alias of:N*T*Ctcg,tpm-tis-mmioC* tpm_tis
alias of:N*T*Ctcg,tpm-tis-mmio tpm_tis
alias of:N*T*Caspeed,ast2[56]00-mdio* mdio_aspeed
alias fs-ext4 ext4
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		modalias string
		want     []string
	}{
		{"pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00", []string{"virtio_pci"}},
		{"pci:v00008086d00001041sv00001AF4sd00001100bc02sc00i00", nil},
		{"virtio:d00000001v00001AF4", []string{"virtio_net"}},
		{"of:Ntpm_tisT(null)Ctcg,tpm-tis-mmio", []string{"tpm_tis"}},
		{"of:Na/bT(null)Ctcg,tpm-tis-mmioCother", []string{"tpm_tis"}},
		{"of:NmdioT(null)Caspeed,ast2600-mdio", []string{"mdio_aspeed"}},
		{"of:NmdioT(null)Caspeed,ast2400-mdio", nil},
		{"fs-ext4", []string{"ext4"}},
		{"", nil},
	} {
		if diff := cmp.Diff(tt.want, modulesFor(table, tt.modalias)); diff != "" {
			t.Errorf("modulesFor(%q) (-want +got):\n%s", tt.modalias, diff)
		}
	}
	for _, bad := range []string{"alias a", "alias [ b", "options a b"} {
		if _, err := parseAliases(strings.NewReader(bad)); err == nil {
			t.Errorf("parseAliases(%q) = nil error", bad)
		}
	}
}

func FuzzAliases(f *testing.F) {
	f.Add("alias pci:v*d[0-9]* m\n", "pci:v1d2")
	f.Add("# c\n\nalias a/b? m", "a/bc")
	f.Fuzz(func(t *testing.T, table, device string) {
		aliases, err := parseAliases(strings.NewReader(table))
		if err != nil {
			if aliases != nil {
				t.Fatal("value and error")
			}
			return
		}
		for _, m := range modulesFor(aliases, device) {
			if m == "" {
				t.Fatal("a module without a name")
			}
		}
	})
}

func TestMountAt(t *testing.T) {
	const mounts = "rootfs / rootfs rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/vda /var/lib/back\\040door ext4 rw 0 0\ntmpfs /proc tmpfs rw 0 0\nproc /proc proc rw 0 0\nshort\n"
	for _, tt := range []struct{ dir, dev, fstype string }{
		{"/tmp", "tmpfs", "tmpfs"},
		{"/proc", "proc", "proc"},
		{"/var/lib/back door", "/dev/vda", "ext4"},
		{"/none", "", ""},
	} {
		if dev, fstype := mountAt(mounts, tt.dir); dev != tt.dev || fstype != tt.fstype {
			t.Errorf("mountAt(%s) = %q, %q; want %q, %q", tt.dir, dev, fstype, tt.dev, tt.fstype)
		}
	}
}
