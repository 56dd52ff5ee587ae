package host

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// fakeNetwork is a network that is a variable.
type fakeNetwork struct{ s NetworkSettings }

func (n *fakeNetwork) Settings(string) (NetworkSettings, error) { return n.s, nil }
func (n *fakeNetwork) Change(_ string, s NetworkSettings) error { n.s = s; return nil }

func TestConfigureNetwork(t *testing.T) {
	a := newFakeAgent()
	a.network = &fakeNetwork{s: NetworkSettings{HostName: "dpu.example.com", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.5/24")}}}
	c := connect(t, a)
	var uri string
	for i, err := range client.Members[schema.EthernetInterface](t.Context(), c, managerURI+"/EthernetInterfaces") {
		if err != nil {
			t.Fatal(err)
		}
		uri = i.ODataID
	}
	if uri == "" {
		t.Skip("this machine has no Ethernet interface to show")
	}
	type obj = map[string]any
	var out schema.EthernetInterface
	if err := c.Patch(t.Context(), uri, obj{
		"HostName": "nic", "StaticNameServers": []string{"10.0.0.1", "2001:db8::1"},
		"IPv4StaticAddresses": []obj{{"Address": "10.0.0.6", "SubnetMask": "255.255.254.0", "Gateway": "10.0.1.1"}},
	}, &out); err != nil {
		t.Fatal(err)
	}
	if s := a.network.s; s.HostName != "nic.example.com" || len(s.NameServers) != 2 || !slices.Equal(s.Addresses, []netip.Prefix{netip.MustParsePrefix("10.0.0.6/23")}) || s.Gateway != netip.MustParseAddr("10.0.1.1") {
		t.Errorf("configured %+v", s)
	}
	if len(out.IPv4StaticAddresses) != 1 || out.IPv4StaticAddresses[0].Gateway == nil || *out.IPv4StaticAddresses[0].Gateway != "10.0.1.1" || len(out.StaticNameServers) != 2 {
		t.Errorf("the answer shows %+v", out)
	}
	was := a.network.s
	for name, body := range map[string]obj{
		"a strange name":          {"HostName": "a b"},
		"an empty label":          {"FQDN": "a..b"},
		"no address":              {"IPv4StaticAddresses": []obj{}},
		"an address that is none": {"IPv4StaticAddresses": []obj{{"Address": "10.0.0.256", "SubnetMask": "255.255.255.0"}}},
		"multicast":               {"IPv4StaticAddresses": []obj{{"Address": "224.0.0.1", "SubnetMask": "255.255.255.0"}}},
		"a mask with a hole":      {"IPv4StaticAddresses": []obj{{"Address": "10.0.0.6", "SubnetMask": "255.0.255.0"}}},
		"a gateway elsewhere":     {"IPv4StaticAddresses": []obj{{"Address": "10.0.0.6", "SubnetMask": "255.255.255.0", "Gateway": "10.9.0.1"}}},
		"no name server":          {"StaticNameServers": []string{"ns.example.com"}},
		"many name servers":       {"StaticNameServers": slices.Repeat([]string{"10.0.0.1"}, 9)},
	} {
		if err := c.Patch(t.Context(), uri, body, nil); status(err) != 400 {
			t.Errorf("%s: %v; want 400", name, err)
		}
	}
	if a.network.s.HostName != was.HostName || !slices.Equal(a.network.s.Addresses, was.Addresses) {
		t.Errorf("what was refused has changed the settings to %+v", a.network.s)
	}
}

func FuzzAddresses(f *testing.F) {
	f.Add("10.0.0.6", "255.255.254.0", "10.0.1.1")
	f.Add("10.0.0.6", "255.0.255.0", "")
	f.Fuzz(func(t *testing.T, address, mask, gateway string) {
		s := NetworkSettings{Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.9.9/24"), netip.MustParsePrefix("2001:db8::1/64")}}
		if s.setAddresses([]map[string]any{{"Address": address, "SubnetMask": mask, "Gateway": gateway}}) != nil {
			return
		}
		if len(s.Addresses) != 2 || !s.Addresses[0].Addr().Is6() || !s.Addresses[1].IsValid() || s.Addresses[1].Bits() == 0 || gateway != "" && !s.Addresses[1].Contains(s.Gateway) {
			t.Errorf("%q, %q, %q make %+v", address, mask, gateway, s)
		}
		four, _ := addresses(s.Addresses)
		if len(four) != 1 || four[0].SubnetMask != netip.MustParseAddr(mask).String() {
			t.Errorf("%q, %q, %q are shown as %+v", address, mask, gateway, four)
		}
	})
}
