package host

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Network is how the network of the agent's machine is configured, which stays over restarts.
type Network interface {
	// Settings returns what is configured for the interface of that name.
	Settings(name string) (NetworkSettings, error)
	// Change configures it, and makes it so within seconds: the caller's answer goes out on the old addresses.
	Change(name string, s NetworkSettings) error
}

// NetworkSettings are the settings of one interface and, as far as they are the machine's, of all.
type NetworkSettings struct {
	HostName    string       // of the machine, perhaps with its domain
	NameServers []netip.Addr // of the machine, besides what DHCP names
	DHCP        bool
	Addresses   []netip.Prefix // static ones
	Gateway     netip.Addr     // invalid if there is none
}

const maxStatic = 8 // addresses, name servers

// configurable completes a route of the agent's interfaces with what can be changed, if anything.
func (h *host) configurable(r service.Route) service.Route {
	if h.o.Network == nil {
		return r
	}
	r.Patch = &service.Patch{
		Properties: []service.Property{
			{Name: "HostName", Kind: service.String, Min: 1, Max: 63}, {Name: "FQDN", Kind: service.String, Min: 1, Max: 64},
			{Name: "StaticNameServers", Kind: service.StringArray}, {Name: "IPv4StaticAddresses", Kind: service.ObjectArray},
			// The same by the names of what is in use, which profiles want to be written.
			{Name: "NameServers", Kind: service.StringArray}, {Name: "IPv4Addresses", Kind: service.ObjectArray},
		},
		Do: h.configure,
	}
	return r
}

var hostLabel = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)

// configure is the PATCH of an interface of the agent's machine.
func (h *host) configure(r *service.Request, v service.Values) error {
	name := r.Param("interface")
	s, err := h.o.Network.Settings(name)
	if err != nil {
		return err
	}
	bad := func(property, value, why string) error {
		return &service.Error{Status: 400, Messages: service.Because(400, "PropertyValueFormatError", property+": "+why+".", value, property).Messages}
	}
	names := func(property, text string) error {
		for label := range strings.SplitSeq(text, ".") {
			if !hostLabel.MatchString(label) {
				return bad(property, text, "a name is letters, digits and dashes, with dots between the labels of a domain")
			}
		}
		return nil
	}
	if text := v.String("FQDN"); text != "" {
		if err := names("FQDN", text); err != nil {
			return err
		}
		s.HostName = text
	}
	if text := v.String("HostName"); text != "" {
		if err := names("HostName", text); err != nil {
			return err
		}
		if _, domain, ok := strings.Cut(s.HostName, "."); ok && !strings.Contains(text, ".") {
			text += "." + domain
		}
		s.HostName = text
	}
	for _, property := range []string{"NameServers", "StaticNameServers"} {
		if !v.Has(property) {
			continue
		}
		s.NameServers = nil
		for _, text := range v.Strings(property) {
			a, err := netip.ParseAddr(text)
			if err != nil || a.IsUnspecified() || a.IsMulticast() || len(s.NameServers) >= maxStatic {
				return bad(property, text, fmt.Sprintf("want the addresses of at most %d servers", maxStatic))
			}
			s.NameServers = append(s.NameServers, a)
		}
	}
	for _, property := range []string{"IPv4Addresses", "IPv4StaticAddresses"} {
		if list, ok := v[property].([]map[string]any); ok {
			if err := s.setAddresses(list); err != nil {
				return bad(property, property, err.Error())
			}
		}
	}
	return h.o.Network.Change(name, s)
}

// setAddresses takes the IPv4 addresses of a request in the place of those that are configured.
func (s *NetworkSettings) setAddresses(list []map[string]any) error {
	addresses := slices.DeleteFunc(slices.Clone(s.Addresses), func(p netip.Prefix) bool { return p.Addr().Is4() })
	var gateway netip.Addr
	for _, one := range list {
		text := func(name string) string { t, _ := one[name].(string); return t }
		a, err := netip.ParseAddr(text("Address"))
		if err != nil || !a.Is4() || !a.IsGlobalUnicast() {
			return fmt.Errorf("%q is no address of a host", text("Address"))
		}
		mask, err := netip.ParseAddr(text("SubnetMask"))
		bits, ok := maskBits(mask)
		if err != nil || !ok || bits == 0 {
			return fmt.Errorf("%q is no subnet mask", text("SubnetMask"))
		}
		p := netip.PrefixFrom(a, bits)
		if g := text("Gateway"); g != "" {
			gw, err := netip.ParseAddr(g)
			if err != nil || !p.Contains(gw) || gateway.IsValid() && gateway != gw {
				return fmt.Errorf("%q is no gateway of %s, or there are two", g, p)
			}
			gateway = gw
		}
		if addresses = append(addresses, p); len(addresses) > maxStatic {
			return fmt.Errorf("there are more than %d", maxStatic)
		}
	}
	if len(addresses) == 0 && !s.DHCP {
		return fmt.Errorf("the interface would be left without an address, for it has no DHCP")
	}
	s.Addresses, s.Gateway = addresses, gateway
	return nil
}

// maskBits is the length of a subnet mask.
func maskBits(mask netip.Addr) (int, bool) {
	if !mask.Is4() {
		return 0, false
	}
	b := mask.As4()
	n := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	ones, rest, _ := strings.Cut(strconv.FormatUint(uint64(n)|1<<32, 2)[1:], "0")
	return len(ones), !strings.Contains(rest, "1")
}

// settings fills in what is configured of an interface.
func (h *host) settings(name string, out *schema.EthernetInterface) {
	if h.o.Network == nil {
		return
	}
	s, err := h.o.Network.Settings(name)
	if err != nil {
		return
	}
	servers := []string{}
	for _, a := range s.NameServers {
		servers = append(servers, a.String())
	}
	static, _ := addresses(s.Addresses)
	for _, list := range [][]schema.IPv4Address{static, out.IPv4Addresses} {
		for i := range list {
			list[i].WriteableProperties = []string{"Address", "SubnetMask", "Gateway"}
		}
	}
	for i := range static {
		if s.Gateway.IsValid() && s.Addresses[i].Contains(s.Gateway) {
			gateway := s.Gateway.String()
			static[i].Gateway = &gateway
		}
	}
	out.StaticNameServers, out.IPv4StaticAddresses = servers, static
	out.DHCPv4 = &schema.DHCPv4{DHCPEnabled: s.DHCP}
}
