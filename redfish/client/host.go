package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// OEM decodes our object of an Oem member into v. It reports whether there is one.
func OEM(o schema.OEM, v any) (bool, error) {
	raw, ok := o[oem.Identifier]
	if !ok {
		return false, nil
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return false, fmt.Errorf("decode OEM object: %w", err)
	}
	return true, nil
}

// ListingURI returns the URI of the resource of one of package query's listings, by the resource's name.
func ListingURI(resource string) string {
	return "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/" + resource
}

// The URIs of an agent's resources.
const (
	StateURI    = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/State"
	TasksURI    = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/Tasks"
	FindingsURI = "/redfish/v1/Systems/system/LogServices/Findings/Entries"
	DmesgURI    = "/redfish/v1/Systems/system/LogServices/Dmesg/Entries"
	LeasesURI   = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/MemoryLeases"
	JournalURI  = "/redfish/v1/Managers/bmc/LogServices/Journal/Entries"
	NetworkURI  = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/Datapath"
)

// HealRequest asks for the repair of a finding.
type HealRequest struct {
	Finding string `json:"Finding"`          // ID
	Action  string `json:"Action,omitempty"` // the repair; empty means the one that policy proposes
	DryRun  bool   `json:"DryRun,omitempty"` // plan only
	Plan    string `json:"Plan,omitempty"`   // digest of the plan that was agreed to; another one is refused
	// Setting is what an action that takes a value is to set to Value; empty and nil mean what policy says.
	Setting string `json:"Setting,omitempty"`
	Value   *int64 `json:"Value,omitempty"`
}

// ObeyOrder has the agent carry out a signed order about its access agreement.
func (c *Client) ObeyOrder(ctx context.Context, document []byte) error {
	return c.hostAction(ctx, "ObeyOrder", map[string]any{"Document": string(document)}, nil)
}

// OfferAgreement has the agent take a signed access agreement.
func (c *Client) OfferAgreement(ctx context.Context, document []byte) error {
	return c.hostAction(ctx, "OfferAgreement", map[string]any{"Document": string(document)}, nil)
}

// Heal has a finding repaired, or a repair planned, and waits for the end. The task's Oem object, which OEM decodes, holds the
// Plan and the Outcome; it is returned with a *TaskError as well, as far as it came.
func (c *Client) Heal(ctx context.Context, r HealRequest, progress func(schema.Task)) (*schema.Task, error) {
	return c.healing(ctx, "Heal", r, progress)
}

// UndoRequest asks for the latest repair of a finding to be taken back.
type UndoRequest struct {
	Finding string `json:"Finding"` // ID
	DryRun  bool   `json:"DryRun,omitempty"`
	Plan    string `json:"Plan,omitempty"` // as HealRequest's
}

// UndoHeal has a finished repair taken back, or that planned, and waits for the end. What it returns is as Heal's.
func (c *Client) UndoHeal(ctx context.Context, r UndoRequest, progress func(schema.Task)) (*schema.Task, error) {
	return c.healing(ctx, "UndoHeal", r, progress)
}

func (c *Client) healing(ctx context.Context, name string, request any, progress func(schema.Task)) (*schema.Task, error) {
	s, err := c.System(ctx)
	if err != nil {
		return nil, err
	}
	action, ok := s.Actions["#BackdoorComputerSystem."+name]
	if !ok {
		return nil, fmt.Errorf("the service has no action %s: it is not a Backdoor agent, or an older one", name)
	}
	return c.Run(ctx, action.Target, request, nil, progress)
}

// RDMAURI is the resource about the agent's remote access by RDMA.
const RDMAURI = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/RDMA"

// RDMARequest asks for a lease of the agent's RDMA service. Zero members other than PSN are left to the agent.
type RDMARequest struct {
	Kind    string `json:"Kind"` // "memory", "health" or "actions"
	Peer    string `json:"Peer"` // the IP address of our queue pair
	QPN     uint32 `json:"QPN"`
	PSN     uint32 `json:"PSN"`
	PathMTU int    `json:"PathMTU,omitempty"`
	Start   string `json:"Start,omitempty"` // 0x and hexadecimal digits
	Length  uint64 `json:"Length,omitempty"`
	Write   bool   `json:"Write,omitempty"`
	Atomic  bool   `json:"Atomic,omitempty"`
	Seconds int    `json:"Seconds,omitempty"`
}

// RDMALease is the agent's end of the connection, and the keys of what it gives access to.
type RDMALease struct {
	ID, Address       string
	QPN, PSN          uint32
	PathMTU           int
	Expires           time.Time
	Write, Atomic     bool
	RKey              uint32
	Start, Length     string // 0x and hexadecimal digits
	MapKey, MapLength uint32
}

// LeaseRDMA lets a queue pair of ours connect to the agent.
func (c *Client) LeaseRDMA(ctx context.Context, r RDMARequest) (l RDMALease, err error) {
	s, err := c.System(ctx)
	if err != nil {
		return l, err
	}
	action, ok := s.Actions["#BackdoorRDMA.Lease"]
	if !ok {
		return l, errors.New("the service has no RDMA: it is not a Backdoor agent, or not configured for it")
	}
	_, err = c.Post(ctx, action.Target, r, &l)
	return l, err
}

// RevokeRDMA ends a lease at once.
func (c *Client) RevokeRDMA(ctx context.Context, id string) error {
	s, err := c.System(ctx)
	if err != nil {
		return err
	}
	_, err = c.Post(ctx, s.Actions["#BackdoorRDMA.Revoke"].Target, map[string]string{"Lease": id}, nil)
	return err
}
