package host

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const rdmaURI = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/RDMA"

// RDMA is the agent's remote access by RDMA.
type RDMA interface {
	// Lease lets the peer of a request connect. The error tells an operator what to do; it wraps access.ErrDenied if the agreement
	// does not permit it.
	Lease(RDMARequest) (RDMALease, error)
	Revoke(id, user string) error
	State() RDMAState
}

// RDMARequest asks for a lease for the user, who was authenticated here.
type RDMARequest struct {
	User          string
	Kind          string // "memory", "health" or "actions"
	Peer          netip.Addr
	QPN, PSN      uint32
	PathMTU       int // 0: what fits
	Start, Length uint64
	Write, Atomic bool
	Lifetime      time.Duration
}

// RDMALease is what the peer must know. Numbers of 64 bits are text, as 0x and hexadecimal digits.
type RDMALease struct {
	ID        string    `json:"id" doc:"Names the lease, to revoke it."`
	User      string    `json:"user" doc:"Who it was given to."`
	Kind      string    `json:"kind" doc:"What it is for: memory, health or actions."`
	Peer      string    `json:"peer" doc:"The address that it is bound to."`
	Address   string    `json:"address" doc:"The IP address of the agent to connect to."`
	QPN       uint32    `json:"qpn" doc:"The number of the agent's queue pair."`
	PSN       uint32    `json:"psn" doc:"The number of the first packet that the agent sends."`
	PathMTU   int       `json:"pathMTU" doc:"The payload of a full packet, in bytes."`
	Expires   time.Time `json:"expires" doc:"When the lease ends by itself."`
	Write     bool      `json:"write" doc:"Whether the memory may be stored to."`
	Atomic    bool      `json:"atomic" doc:"Whether the memory takes atomic operations."`
	RKey      uint32    `json:"rkey" doc:"The key of the memory."`
	Start     string    `json:"start" doc:"The address of the memory: of the host's, the physical one."`
	Length    string    `json:"length" doc:"The length of the memory in bytes."`
	MapKey    uint32    `json:"mapKey" doc:"The key of the map of the host's RAM, which is at address 0."`
	MapLength uint32    `json:"mapLength" doc:"The length of that map in bytes."`
}

// RDMAState is what remote access by RDMA stands at.
type RDMAState struct {
	Addresses []string      `json:"addresses" doc:"The IP addresses that the agent serves RDMA on."`
	Leases    []RDMALease   `json:"leases" doc:"The leases that there are."`
	Stores    uint64        `json:"stores" doc:"Stores to the host's memory that peers have made, atomic ones too."`
	Refused   uint64        `json:"refused" doc:"Requests of peers that were refused."`
	Dropped   uint64        `json:"dropped" doc:"Packets that were dropped, for whatever reason but that they came twice."`
	Counters  []RDMACounter `json:"counters" doc:"All counters, by the names that the agent's engine has for them."`
}

// RDMACounter is a counter.
type RDMACounter struct {
	Name  string `json:"name" doc:"What is counted."`
	Value uint64 `json:"value" doc:"How often it has happened since the agent started."`
}

// rdmaResource is the resource …/Oem/dev_backdoor/RDMA.
type rdmaResource struct {
	schema.Resource
	RDMA oem.Value[RDMAState] `doc:"Remote access by RDMA at this moment."`
}

func rdmaSchema() oem.Schema {
	return oem.Schema{
		Name: "BackdoorRDMA", Version: "v1_0_0", Purpose: "Remote access to the host and its agent by RDMA.", Resource: rdmaResource{},
		URIs: []string{"/redfish/v1/Systems/{ComputerSystemId}/Oem/" + oem.Identifier + "/RDMA"},
		Actions: []oem.Action{
			{
				Name: "Lease", Bound: "ComputerSystem.v1_0_0.OemActions",
				Description: "Lets a queue pair of the caller's connect to the agent for a time. The answer is the lease.",
				Parameters: []oem.Parameter{
					{Name: "Kind", Type: "Edm.String", Required: true, Description: "What it is for: memory, health or actions."},
					{Name: "Peer", Type: "Edm.String", Required: true, Description: "The IP address of the caller's queue pair."},
					{Name: "QPN", Type: "Edm.Int64", Required: true, Description: "Its number."},
					{Name: "PSN", Type: "Edm.Int64", Required: true, Description: "The number of the first packet that it sends."},
					{Name: "PathMTU", Type: "Edm.Int64", Description: "The payload of a full packet. If absent, what fits the agent's network."},
					{Name: "Start", Type: "Edm.String", Description: "The physical address of the first byte of the host's memory, as 0x and hexadecimal digits. If absent, 0."},
					{Name: "Length", Type: "Edm.Int64", Description: "The number of bytes. If absent, up to the end of RAM."},
					{Name: "Write", Type: "Edm.Boolean", Description: "Whether the memory is to be stored to."},
					{Name: "Atomic", Type: "Edm.Boolean", Description: "Whether the memory is to take atomic operations."},
					{Name: "Seconds", Type: "Edm.Int64", Description: "How long the lease is to last. If absent, ten minutes."},
				},
			},
			{
				Name: "Revoke", Bound: "ComputerSystem.v1_0_0.OemActions",
				Description: "Ends a lease at once.",
				Parameters:  []oem.Parameter{{Name: "Lease", Type: "Edm.String", Required: true, Description: "The Id of the lease."}},
			},
		},
	}
}

// rdmaActions are the actions on the system; none without RDMA. What a lease is for decides about the privileges that it needs,
// and it asks for them itself.
func (h *host) rdmaActions() []service.Action {
	if h.o.RDMA == nil {
		return nil
	}
	const most24, most32 = 1<<24 - 1, 1 << 40
	return []service.Action{
		{
			Name: "BackdoorRDMA.Lease", OEM: true, Title: "Let a queue pair connect", Privileges: service.Privileges{{service.Login}},
			Parameters: []service.Property{
				{Name: "Kind", Kind: service.String, Required: true, Values: []string{"memory", "health", "actions"}},
				{Name: "Peer", Kind: service.String, Required: true, Min: 2, Max: 64},
				{Name: "QPN", Kind: service.Number, Required: true, Min: 2, Max: most24},
				{Name: "PSN", Kind: service.Number, Required: true, Min: 0, Max: most24},
				{Name: "PathMTU", Kind: service.Number, Min: 256, Max: 4096},
				{Name: "Start", Kind: service.String, Min: 1, Max: 20},
				{Name: "Length", Kind: service.Number, Min: 1, Max: most32},
				{Name: "Write", Kind: service.Boolean},
				{Name: "Atomic", Kind: service.Boolean},
				{Name: "Seconds", Kind: service.Number, Min: 1, Max: 24 * 60 * 60},
			},
			Do: h.leaseRDMA,
		},
		{
			Name: "BackdoorRDMA.Revoke", OEM: true, Title: "End a lease at once", Privileges: service.Privileges{{service.ConfigureComponents}},
			Parameters: []service.Property{{Name: "Lease", Kind: service.String, Required: true, Min: 1, Max: 64}},
			Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
				if err := h.o.RDMA.Revoke(v.String("Lease"), r.Caller.User); err != nil {
					return nil, service.Because(404, "ResourceNotFound", sentence(err), "Lease", v.String("Lease"))
				}
				return nil, nil
			},
		},
	}
}

func (h *host) leaseRDMA(r *service.Request, v service.Values) (*service.Reply, error) {
	const action = "BackdoorRDMA.Lease"
	peer, err := netip.ParseAddr(v.String("Peer"))
	if err != nil {
		return nil, service.Because(400, "ActionParameterValueFormatError", fmt.Sprintf("Peer %q is no IP address.", v.String("Peer")), v.String("Peer"), "Peer", action)
	}
	q := RDMARequest{
		User: r.Caller.User, Kind: v.String("Kind"), Peer: peer.Unmap(), QPN: uint32(v.Int("QPN")), PSN: uint32(v.Int("PSN")), PathMTU: int(v.Int("PathMTU")),
		Length: uint64(v.Int("Length")), Write: v.Bool("Write"), Atomic: v.Bool("Atomic"), Lifetime: time.Duration(v.Int("Seconds")) * time.Second,
	}
	if v.Has("Start") {
		if _, err := fmt.Sscanf(v.String("Start"), "0x%x", &q.Start); err != nil {
			return nil, service.Because(400, "ActionParameterValueFormatError", fmt.Sprintf("Start %q is no physical address: write it like \"0x100000\".", v.String("Start")), v.String("Start"), "Start", action)
		}
	}
	l, err := h.o.RDMA.Lease(q)
	if err != nil {
		return nil, refusal(err)
	}
	body, err := oem.Encode(l)
	if err != nil {
		return nil, err
	}
	return &service.Reply{Status: 200, Body: body}, nil
}

// rdmaRoutes are the resources; none without RDMA.
func (h *host) rdmaRoutes() []service.Route {
	if h.o.RDMA == nil {
		return nil
	}
	return []service.Route{{
		URI: rdmaURI, Type: rdmaSchema().Type("BackdoorRDMA"),
		Get: func(*service.Request) (schema.Object, error) {
			return &rdmaResource{Resource: schema.Resource{Name: "Remote access by RDMA"}, RDMA: oem.Value[RDMAState]{V: h.o.RDMA.State()}}, nil
		},
	}}
}

// RDMARefused is the event that tells of packets and requests of remote access that were dropped or refused.
func RDMARefused(text string) service.Event {
	return service.Event{MessageID: "BackdoorHost.1.0.RDMARefused", Args: []string{text}, Message: text, Severity: schema.HealthWarning, Origin: rdmaURI, Time: time.Now()}
}

func (h *host) rdmaLink() *schema.Link {
	if h.o.RDMA == nil {
		return nil
	}
	return schema.LinkTo(rdmaURI)
}
