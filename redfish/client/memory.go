package client

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Lease is a range of the host's RAM that the service has lent to the client's user for a time.
type Lease struct {
	ID      string
	URI     string
	Start   uint64 // physical address
	Length  int64  // bytes
	Write   bool
	Expires time.Time
	DataURI string
	Second  string // who else has said yes to stores; empty if nobody has
	Stores  []LeaseStore
}

// LeaseStore is one store under a lease.
type LeaseStore struct {
	At      time.Time
	Address string
	Bytes   int64
	How     string // compare-and-swap, or read-compare-write-verify
	Plan    string // its plan in the journal
	Undone  bool
}

// LeaseRequest asks for a lease.
type LeaseRequest struct {
	Start   uint64 // physical address
	Length  int64  // bytes
	Seconds int    // zero is the service's choice
	Write   bool   // for stores, too
}

// leaseResource is a lease as the service shows it.
type leaseResource struct {
	schema.Resource
	Lease struct {
		Start   string
		Length  int64
		Write   bool
		Expires time.Time
		DataURI string
		Second  string
		Stores  []LeaseStore
	}
}

func (r *leaseResource) lease() (*Lease, error) {
	start, err := strconv.ParseUint(r.Lease.Start, 0, 64)
	if err != nil {
		return nil, fmt.Errorf("the lease's start: %w", err)
	}
	return &Lease{ID: r.ID, URI: r.ODataID, Start: start, Length: r.Lease.Length, Write: r.Lease.Write, Expires: r.Lease.Expires, DataURI: r.Lease.DataURI, Second: r.Lease.Second, Stores: r.Lease.Stores}, nil
}

// hostAction runs an action of ours on the host.
func (c *Client) hostAction(ctx context.Context, name string, in map[string]any, out any) error {
	s, err := c.System(ctx)
	if err != nil {
		return err
	}
	action, ok := s.Actions["#BackdoorComputerSystem."+name]
	if !ok {
		return fmt.Errorf("the service has no action %s: it is not a Backdoor agent, or an older one", name)
	}
	_, err = c.Post(ctx, action.Target, in, out)
	return err
}

// LeaseMemory asks for a lease of the host's RAM. It takes the privilege BackdoorMemory.
func (c *Client) LeaseMemory(ctx context.Context, r LeaseRequest) (*Lease, error) {
	in := map[string]any{"Start": fmt.Sprintf("%#x", r.Start), "Length": r.Length, "Write": r.Write}
	if r.Seconds != 0 {
		in["Seconds"] = r.Seconds
	}
	var out leaseResource
	if err := c.hostAction(ctx, "LeaseMemory", in, &out); err != nil {
		return nil, err
	}
	return out.lease()
}

// Lease reads a lease as it stands now.
func (c *Client) Lease(ctx context.Context, uri string) (*Lease, error) {
	var out leaseResource
	if err := c.Get(ctx, uri, &out); err != nil {
		return nil, err
	}
	return out.lease()
}

// ReadMemory copies n bytes from a physical address on, which a lease must hold, to w.
func (c *Client) ReadMemory(ctx context.Context, l *Lease, at uint64, n int64, w io.Writer) error {
	if at < l.Start || n <= 0 || n > l.Length || at-l.Start > uint64(l.Length-n) {
		return fmt.Errorf("read %d bytes at %#x: that is not within lease %s", n, at, l.ID)
	}
	off := int64(at - l.Start)
	got, err := c.download(ctx, l.DataURI, off, off+n-1, w)
	if err == nil && got != n {
		err = fmt.Errorf("the service sent %d of %d bytes", got, n)
	}
	return err
}

// StoreMemory puts bytes at a physical address, if those that are expected are there.
func (c *Client) StoreMemory(ctx context.Context, l *Lease, at uint64, expect, put []byte) error {
	return c.hostAction(ctx, "StoreMemory", map[string]any{
		"Lease": l.ID, "Address": fmt.Sprintf("%#x", at), "Expect": hex.EncodeToString(expect), "Put": hex.EncodeToString(put),
	}, nil)
}

// CosignLease says yes to the stores under somebody else's lease.
func (c *Client) CosignLease(ctx context.Context, id string) error {
	return c.hostAction(ctx, "CosignLease", map[string]any{"Lease": id}, nil)
}

// UndoStores takes the stores under a lease back.
func (c *Client) UndoStores(ctx context.Context, l *Lease) error {
	return c.hostAction(ctx, "UndoStores", map[string]any{"Lease": l.ID}, nil)
}

// EndLease ends a lease. One that has ended by itself is no error.
func (c *Client) EndLease(ctx context.Context, l *Lease) error {
	err := c.Delete(ctx, l.URI)
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusNotFound {
		return nil
	}
	return err
}
