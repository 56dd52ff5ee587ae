package host

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	datapathURI = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/Datapath"
	functionURI = adapterURI + "/NetworkDeviceFunctions/host"
)

// Datapath is the packet path between the host and the wire, where the agent's card stands there.
type Datapath interface {
	State() (DatapathState, error)
}

// DatapathState is what the packet path has done since it was first opened.
type DatapathState struct {
	HostPort   string            `json:"hostPort" doc:"The Id of the card's port that leads to the host."`
	UplinkPort string            `json:"uplinkPort" doc:"The Id of the card's port that leads to the wire."`
	LastFrame  time.Time         `json:"lastFrame,omitzero" doc:"When the host sent its latest frame; absent if it has sent none."`
	Counters   []DatapathCounter `json:"counters" doc:"What became of the frames that came in."`
	Flows      []DatapathFlow    `json:"flows" doc:"The conversations of the host that are kept records of, those with the most frames first."`
}

// DatapathCounter counts frames.
type DatapathCounter struct {
	Port    string `json:"port" doc:"Where they came in: host or uplink."`
	Verdict string `json:"verdict" doc:"What became of them: forwarded, passed to the agent, or why they were dropped."`
	Frames  uint64 `json:"frames" doc:"How many."`
	Bytes   uint64 `json:"bytes" doc:"Their length, Ethernet headers included."`
}

// DatapathFlow is a conversation of the host.
type DatapathFlow struct {
	Host     string    `json:"host" doc:"The host's address and port."`
	Remote   string    `json:"remote" doc:"The other machine's address and port."`
	Protocol int       `json:"protocol" doc:"The number of the protocol, as IANA has it."`
	Sent     uint64    `json:"sent" doc:"Packets that the host has sent, forwarded or not."`
	Received uint64    `json:"received" doc:"Packets that were sent to the host, forwarded or not."`
	Held     uint64    `json:"held" doc:"Packets of these that were kept back."`
	Last     time.Time `json:"last" doc:"When the latest of them came."`
}

// datapathContainment is what keeps the host's traffic back, as the resource shows it.
type datapathContainment struct {
	QuarantineUntil time.Time         `json:"quarantineUntil,omitzero" doc:"When the quarantine ends; absent if there is none."`
	Allow           []string          `json:"allow,omitempty" doc:"The remotes that a quarantined host may talk to."`
	LimitUntil      time.Time         `json:"limitUntil,omitzero" doc:"When the limit ends; absent if there is none."`
	BytesPerSecond  uint64            `json:"bytesPerSecond,omitempty" doc:"What the host may send a second."`
	BurstBytes      uint64            `json:"burstBytes,omitempty" doc:"What the host may send at once."`
	Blocked         []datapathBlocked `json:"blocked,omitempty" doc:"Remotes that are kept back."`
}

type datapathBlocked struct {
	Remote   string    `json:"remote" doc:"The address."`
	Protocol int       `json:"protocol,omitempty" doc:"The number of the protocol; absent for all."`
	Port     int       `json:"port,omitempty" doc:"The remote's port; absent for all."`
	Until    time.Time `json:"until" doc:"When it ends."`
}

// datapathResource is the resource …/Oem/dev_backdoor/Datapath.
type datapathResource struct {
	schema.Resource
	Datapath    oem.Value[DatapathState]       `doc:"What the packet path has done."`
	Containment oem.Value[datapathContainment] `doc:"What keeps the host's traffic back now."`
}

func datapathSchema() oem.Schema {
	return oem.Schema{
		Name: "BackdoorDatapath", Version: "v1_0_0", Purpose: "The packet path between the host and the wire.", Resource: datapathResource{},
		URIs: []string{"/redfish/v1/Systems/{ComputerSystemId}/Oem/" + oem.Identifier + "/Datapath"},
		Actions: []oem.Action{
			{
				Name: "Quarantine", Bound: "ComputerSystem.v1_0_0.OemActions",
				Description: "Cuts the host, or its traffic with one remote, off for a time. It is in force when the answer comes.",
				Parameters: []oem.Parameter{
					{Name: "Seconds", Type: "Edm.Int64", Description: "How long. If absent, ten minutes."},
					{Name: "Allow", Type: "Collection(Edm.String)", Description: "Prefixes of remotes that the host may still talk to."},
					{Name: "Remote", Type: "Edm.String", Description: "The address of the one remote to cut off. If absent, all."},
					{Name: "Protocol", Type: "Edm.Int64", Description: "The protocol to keep back with that remote, as IANA numbers it. If absent, all."},
					{Name: "Port", Type: "Edm.Int64", Description: "The remote's port. If absent, all."},
				},
			},
			{
				Name: "RateLimit", Bound: "ComputerSystem.v1_0_0.OemActions",
				Description: "Bounds what the host may send, for a time. It is in force when the answer comes.",
				Parameters: []oem.Parameter{
					{Name: "Seconds", Type: "Edm.Int64", Description: "How long. If absent, ten minutes."},
					{Name: "BytesPerSecond", Type: "Edm.Int64", Description: "How much. If absent, 32 KiB."},
					{Name: "BurstBytes", Type: "Edm.Int64", Description: "How much at once. If absent, 32 KiB."},
				},
			},
			{
				Name: "Release", Bound: "ComputerSystem.v1_0_0.OemActions", Description: "Lets all of the host's traffic through again.",
			},
		},
	}
}

// datapathActions are the actions on the system; none without a packet path.
func (h *host) datapathActions() []service.Action {
	if h.o.Datapath == nil {
		return nil
	}
	may := service.Privileges{{service.ConfigureComponents, PrivilegeHeal}}
	seconds := service.Property{Name: "Seconds", Kind: service.Number, Min: 1, Max: int64(heal.LongestOrder / time.Second)}
	return []service.Action{
		{
			Name: "BackdoorDatapath.Quarantine", OEM: true, Title: "Cut the host off", Privileges: may,
			Parameters: []service.Property{
				seconds, {Name: "Allow", Kind: service.StringArray}, {Name: "Remote", Kind: service.String, Min: 2, Max: 64},
				{Name: "Protocol", Kind: service.Number, Min: 1, Max: 255}, {Name: "Port", Kind: service.Number, Min: 1, Max: 65535},
			},
			Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
				bad := func(name, value string) error {
					const action = "BackdoorDatapath.Quarantine"
					return service.Because(400, "ActionParameterValueFormatError", fmt.Sprintf("%s %q is no IP address, or no prefix of such.", name, value), value, name, action)
				}
				o := heal.NetworkOrder{Do: heal.Quarantine}
				for _, text := range v.Strings("Allow") {
					p, err := netip.ParsePrefix(text)
					if a, aerr := netip.ParseAddr(text); aerr == nil {
						p, err = a.Unmap().Prefix(a.Unmap().BitLen())
					}
					if err != nil {
						return nil, bad("Allow", text)
					}
					o.Allow = append(o.Allow, p.Masked())
				}
				if text := v.String("Remote"); text != "" {
					a, err := netip.ParseAddr(text)
					if err != nil {
						return nil, bad("Remote", text)
					}
					o.Remote = &heal.Remote{Addr: a.Unmap(), Proto: uint8(v.Int("Protocol")), Port: uint16(v.Int("Port"))}
				} else if v.Has("Protocol") || v.Has("Port") {
					return nil, bad("Remote", "")
				}
				return h.contain(r, v, o)
			},
		},
		{
			Name: "BackdoorDatapath.RateLimit", OEM: true, Title: "Bound what the host may send", Privileges: may,
			Parameters: []service.Property{
				seconds, {Name: "BytesPerSecond", Kind: service.Number, Min: 1, Max: 1 << 40}, {Name: "BurstBytes", Kind: service.Number, Min: 9216, Max: 1 << 32},
			},
			Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
				o := heal.NetworkOrder{Do: heal.RateLimit, Rate: heal.LimitRate, Burst: heal.LimitBurst}
				if v.Has("BytesPerSecond") {
					o.Rate = uint64(v.Int("BytesPerSecond"))
				}
				if v.Has("BurstBytes") {
					o.Burst = uint64(v.Int("BurstBytes"))
				}
				return h.contain(r, v, o)
			},
		},
		{
			Name: "BackdoorDatapath.Release", OEM: true, Title: "Let the host's traffic through again", Privileges: may,
			Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
				return h.contain(r, v, heal.NetworkOrder{Do: heal.Release})
			},
		},
	}
}

func (h *host) contain(r *service.Request, v service.Values, o heal.NetworkOrder) (*service.Reply, error) {
	if o.Do != heal.Release {
		o.For = heal.ContainFor
		if v.Has("Seconds") {
			o.For = time.Duration(v.Int("Seconds")) * time.Second
		}
	}
	_, err := h.o.Agent.Contain(r.Context(), o, r.Caller.User)
	if errors.Is(err, heal.ErrInvalidPlan) {
		return nil, service.Because(400, "GeneralError", sentence(err))
	}
	return nil, refusal(err)
}

// datapathRoutes are the resources; none without a packet path.
func (h *host) datapathRoutes() []service.Route {
	if h.o.Datapath == nil {
		return nil
	}
	return []service.Route{
		{
			URI: datapathURI, Type: datapathSchema().Type("BackdoorDatapath"),
			Get: func(*service.Request) (schema.Object, error) {
				s, err := h.datapath()
				if err != nil {
					return nil, err
				}
				return &datapathResource{
					Resource: schema.Resource{Name: "Packet path between the host and the wire"}, Datapath: oem.Value[DatapathState]{V: s},
					Containment: oem.Value[datapathContainment]{V: shownContainment(h.o.Agent.State().Contained)},
				}, nil
			},
		},
		{URI: adapterURI + "/NetworkDeviceFunctions", Type: schema.TypeNetworkDeviceFunctionCollection, Name: "Network device functions", Members: service.Fixed("host")},
		{
			URI: functionURI, Type: schema.TypeNetworkDeviceFunction,
			Get: func(*service.Request) (schema.Object, error) {
				s, err := h.datapath()
				if err != nil {
					return nil, err
				}
				out := &schema.NetworkDeviceFunction{
					Resource:       schema.Resource{Name: "Network function of the host", Description: "What the host has on its bus; its other end is the card"},
					NetDevFuncType: "Ethernet", DeviceEnabled: new(true), Metrics: schema.LinkTo(functionURI + "/Metrics"),
					Status: &schema.Status{State: schema.StateEnabled},
				}
				if _, ok := named(h.ports(), s.UplinkPort); ok {
					out.Links = &schema.NetworkDeviceFunctionLinks{PhysicalNetworkPortAssignment: schema.LinkTo(adapterURI + "/Ports/" + s.UplinkPort)}
				}
				if c := h.o.Agent.State().Contained; c != nil {
					if !c.Limit.IsZero() {
						out.Limits = []schema.NetworkLimit{{Direction: "Egress", SustainedBytesPerSecond: c.Rate, BurstBytesPerSecond: c.Burst}}
					}
					if !c.Quarantine.IsZero() {
						out.Status.State = schema.StateQuiesced
					}
				}
				return out, nil
			},
		},
		{
			URI: functionURI + "/Metrics", Type: schema.TypeNetworkDeviceFunctionMetrics,
			Get: func(*service.Request) (schema.Object, error) {
				s, err := h.datapath()
				if err != nil {
					return nil, err
				}
				out := &schema.NetworkDeviceFunctionMetrics{Resource: schema.Resource{Name: "Metrics of the host's network function"}}
				for _, c := range s.Counters {
					switch {
					case c.Port == "host": // all that the host has sent
						out.TXFrames, out.TXBytes = out.TXFrames+c.Frames, out.TXBytes+c.Bytes
					case c.Verdict == "forwarded":
						out.RXFrames, out.RXBytes = c.Frames, c.Bytes
					}
				}
				return out, nil
			},
		},
	}
}

// portMetrics are those of a port of the packet path; service.ErrNotFound for others.
func (h *host) portMetrics(r *service.Request) (schema.Object, error) {
	s, err := h.datapath()
	if err != nil {
		return nil, err
	}
	side := map[string]string{s.HostPort: "host", s.UplinkPort: "uplink"}[r.Param("port")]
	if side == "" {
		return nil, service.ErrNotFound
	}
	out := &schema.PortMetrics{Resource: schema.Resource{Name: "Metrics of the port"}, Networking: &schema.PortNetworking{}}
	for _, c := range s.Counters {
		switch {
		case c.Port == side:
			out.RXBytes, out.Networking.RXFrames = out.RXBytes+c.Bytes, out.Networking.RXFrames+c.Frames
			if c.Verdict != "forwarded" && c.Verdict != "passed" {
				out.Networking.RXDiscards += c.Frames
			}
		case c.Verdict == "forwarded":
			out.TXBytes, out.Networking.TXFrames = c.Bytes, c.Frames
		}
	}
	return out, nil
}

// metered is the link to a port's metrics; nil if it has none.
func (h *host) metered(port string) *schema.Link {
	if h.o.Datapath == nil {
		return nil
	}
	s, err := h.o.Datapath.State()
	if err != nil || port != s.HostPort && port != s.UplinkPort {
		return nil
	}
	return schema.LinkTo(adapterURI + "/Ports/" + port + "/Metrics")
}

func (h *host) datapath() (DatapathState, error) {
	s, err := h.o.Datapath.State()
	if err != nil {
		return s, service.Because(503, "ServiceTemporarilyUnavailable", sentence(err)+" Retry in 5 seconds.", "5")
	}
	return s, nil
}

func shownContainment(c *heal.Containment) (out datapathContainment) {
	if c == nil {
		return out
	}
	out = datapathContainment{QuarantineUntil: c.Quarantine, LimitUntil: c.Limit}
	if !c.Limit.IsZero() {
		out.BytesPerSecond, out.BurstBytes = c.Rate, c.Burst
	}
	for _, p := range c.Allow {
		out.Allow = append(out.Allow, p.String())
	}
	for _, b := range c.Blocked {
		out.Blocked = append(out.Blocked, datapathBlocked{Remote: b.Addr.String(), Protocol: int(b.Proto), Port: int(b.Port), Until: b.Until})
	}
	return out
}

// linked is the link to one of these resources; nil without a packet path.
func (h *host) linked(uri string) *schema.Link {
	if h.o.Datapath == nil {
		return nil
	}
	return schema.LinkTo(uri)
}
