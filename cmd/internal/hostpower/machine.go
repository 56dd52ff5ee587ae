package hostpower

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/bmc-toolbox/bmclib/v2"

	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/host"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

var (
	_ heal.Orderer    = (*Client)(nil)
	_ host.Controller = (*Client)(nil)
)

// errNoRedfish is why an order cannot be given to a BMC that is reached by IPMI alone.
var errNoRedfish = errors.New("the host's BMC is not reached by Redfish, and IPMI cannot do this")

// resets are the orders that bmclib has no word for.
var resets = map[string]schema.ResetType{
	heal.OrderReset: schema.ResetForceRestart, heal.OrderPowerCycle: schema.ResetPowerCycle,
	heal.OrderRestart: schema.ResetGracefulRestart, heal.OrderButton: schema.ResetPushPowerButton,
	heal.OrderPause: schema.ResetPause, heal.OrderResume: schema.ResetResume, heal.OrderSuspend: schema.ResetSuspend,
}

// Orders implements heal.Orderer.
func (c *Client) Orders() []string {
	if c.o.URL == "" {
		return nil
	}
	return slices.Sorted(maps.Keys(resets))
}

// Order passes a restart or the press of the button on to the BMC. It does not wait for what the operating system makes of it.
func (c *Client) Order(ctx context.Context, order string) error {
	t, ok := resets[order]
	if !ok {
		return fmt.Errorf("host BMC %s: order %q is unknown", c.o.URL, order)
	}
	return c.direct(ctx, "order "+string(t), func(ctx context.Context, b *client.Client) error { return b.Reset(ctx, t) })
}

// Describe returns what the BMC tells of the host over Redfish.
func (c *Client) Describe(ctx context.Context) (host.Machine, error) {
	var m host.Machine
	err := c.direct(ctx, "describe the host", func(ctx context.Context, b *client.Client) error {
		s, err := b.System(ctx)
		if err != nil {
			return err
		}
		m = host.Machine{
			Manufacturer: s.Manufacturer, Model: s.Model, SerialNumber: s.SerialNumber, SKU: s.SKU, PartNumber: s.PartNumber,
			BIOSVersion: s.BIOSVersion, Boot: s.Boot, Watchdog: s.Watchdog,
		}
		for _, t := range s.Actions["#ComputerSystem.Reset"].Allowable["ResetType"] {
			m.Resets = append(m.Resets, schema.ResetType(t))
		}
		m.Media, err = media(ctx, b, s)
		return err
	})
	return m, err
}

// media lists the virtual drives of the system or, where older BMCs have them, of its manager.
func media(ctx context.Context, b *client.Client, s *schema.ComputerSystem) ([]schema.VirtualMedia, error) {
	at := s.VirtualMedia
	if at == nil && s.Links != nil && len(s.Links.ManagedBy) > 0 {
		var m schema.Manager
		if err := b.Get(ctx, s.Links.ManagedBy[0].ID, &m); err != nil {
			return nil, err
		}
		at = m.VirtualMedia
	}
	if at == nil {
		return nil, nil
	}
	const enough = 16
	var list []schema.VirtualMedia
	for v, err := range client.Members[schema.VirtualMedia](ctx, b, at.ID) {
		if err != nil {
			return nil, err
		}
		if list = append(list, v); len(list) == enough {
			break
		}
	}
	return list, nil
}

// SetBoot overrides what the host boots from, by Redfish or, where only IPMI is left, as far as that can say it.
func (c *Client) SetBoot(ctx context.Context, to schema.Boot) error {
	err := c.direct(ctx, "set the boot device", func(ctx context.Context, b *client.Client) error {
		s, err := b.System(ctx)
		if err != nil {
			return err
		}
		set := map[string]string{}
		for name, value := range map[string]string{
			"BootSourceOverrideEnabled": to.BootSourceOverrideEnabled, "BootSourceOverrideTarget": to.BootSourceOverrideTarget,
			"BootSourceOverrideMode": to.BootSourceOverrideMode,
		} {
			if value != "" {
				set[name] = value
			}
		}
		return b.Patch(ctx, s.ODataID, map[string]any{"Boot": set}, nil)
	})
	device, ok := ipmiDevices[to.BootSourceOverrideTarget]
	if err == nil || !c.hasIPMI() || !ok || !unreachable(err) {
		return err
	}
	return errors.Join(err, c.on(ctx, c.ipmi(), "set the boot device", func(ctx context.Context, b *bmclib.Client) error {
		_, err := b.SetBootDevice(ctx, device, to.BootSourceOverrideEnabled == "Continuous", to.BootSourceOverrideMode == "UEFI")
		return err
	}))
}

// ipmiDevices are the boot devices that IPMI has words for.
var ipmiDevices = map[string]string{"None": "none", "Pxe": "pxe", "Hdd": "disk", "Cd": "cdrom", "BiosSetup": "bios", "Diags": "diag"}

// unreachable reports whether err says that nobody was there to take the order, or that he could not be trusted.
func unreachable(err error) bool {
	var answered *client.Error
	return !errors.As(err, &answered)
}

// InsertMedia has the BMC put an image into a virtual drive.
func (c *Client) InsertMedia(ctx context.Context, id string, m host.Insertion) error {
	return c.media(ctx, id, "InsertMedia", m)
}

// EjectMedia has the BMC empty a virtual drive.
func (c *Client) EjectMedia(ctx context.Context, id string) error {
	return c.media(ctx, id, "EjectMedia", struct{}{})
}

func (c *Client) media(ctx context.Context, id, action string, body any) error {
	return c.direct(ctx, action+" "+id, func(ctx context.Context, b *client.Client) error {
		s, err := b.System(ctx)
		if err != nil {
			return err
		}
		drives, err := media(ctx, b, s)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(drives, func(v schema.VirtualMedia) bool { return v.ID == id })
		if i < 0 {
			return fmt.Errorf("the BMC has no virtual drive %q", id)
		}
		a, ok := drives[i].Actions["#VirtualMedia."+action]
		if !ok {
			return fmt.Errorf("the BMC offers no %s for its drive %q", action, id)
		}
		_, err = b.Run(ctx, a.Target, body, nil, nil)
		return err
	})
}

// direct runs an order over Redfish in a session of its own, with the project's own client.
func (c *Client) direct(ctx context.Context, what string, order func(context.Context, *client.Client) error) (err error) {
	if c.o.URL == "" {
		return fmt.Errorf("host BMC %s: %s: %w", c.o.IPMI, what, errNoRedfish)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithTimeoutCause(ctx, c.o.Timeout, fmt.Errorf("the host's BMC took longer than %v", c.o.Timeout))
	defer cancel()
	defer func() {
		if err != nil {
			err = &orderError{fmt.Errorf("host BMC %s: %s: %w", c.o.URL, what, err)}
		}
	}()
	b, err := client.New(client.Config{
		URL: "https://" + net.JoinHostPort(strings.Trim(c.host, "[]"), c.port), User: c.o.Username, Password: c.o.Password,
		CA: c.o.Roots, Fingerprint: c.o.Pin, Timeout: c.o.Timeout,
	})
	if err != nil {
		return err
	}
	defer func() {
		if cerr := b.Close(context.WithoutCancel(ctx)); cerr != nil {
			c.o.Logger.Debug("session with the host's BMC did not end", "err", cerr)
		}
	}()
	return order(ctx, b)
}
