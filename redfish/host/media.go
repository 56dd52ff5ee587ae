package host

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	machineFresh   = 20 * time.Second
	machineStale   = 5 * time.Minute
	machineTimeout = 10 * time.Second
)

// machine returns what the host's service processor tells of the host, or nothing.
func (h *host) machine(ctx context.Context) Machine {
	c := h.o.Controller
	if c == nil {
		return Machine{}
	}
	return h.described.get(ctx, h.now, machineFresh, machineStale, func() Machine {
		ctx, cancel := context.WithTimeout(context.Background(), machineTimeout)
		defer cancel()
		m, err := c.Describe(ctx)
		if err != nil {
			return Machine{}
		}
		return m
	})
}

// describe fills in what the host's service processor knows of the system.
func (h *host) describe(ctx context.Context, out *schema.ComputerSystem) {
	m := h.machine(ctx)
	out.Manufacturer, out.Model, out.SerialNumber, out.SKU, out.PartNumber = m.Manufacturer, m.Model, m.SerialNumber, m.SKU, m.PartNumber
	out.BIOSVersion = m.BIOSVersion
	if m.Boot != nil {
		boot := *m.Boot
		boot.WriteableProperties = schema.BootSettings
		out.Boot = &boot
	}
	out.Watchdog = m.Watchdog
	if len(m.Media) > 0 {
		out.VirtualMedia = schema.LinkTo(mediaURI)
	}
}

// bootOverride passes a PATCH of Boot on to the host's service processor.
func (h *host) bootOverride() *service.Patch {
	allowed := func(pick func(*schema.Boot) []string) func(*service.Request) []string {
		return func(r *service.Request) []string {
			if b := h.machine(r.Context()).Boot; b != nil {
				return pick(b)
			}
			return nil
		}
	}
	return &service.Patch{
		Properties: []service.Property{
			{Name: "Boot/BootSourceOverrideEnabled", Kind: service.String, Allowed: allowed(func(b *schema.Boot) []string { return b.BootSourceOverrideEnabledAllowable })},
			{Name: "Boot/BootSourceOverrideTarget", Kind: service.String, Allowed: allowed(func(b *schema.Boot) []string { return b.BootSourceOverrideTargetAllowable })},
			{Name: "Boot/BootSourceOverrideMode", Kind: service.String, Allowed: allowed(func(b *schema.Boot) []string { return b.BootSourceOverrideModeAllowable })},
		},
		Do: func(r *service.Request, v service.Values) error {
			to := schema.Boot{
				BootSourceOverrideEnabled: v.String("Boot/BootSourceOverrideEnabled"), BootSourceOverrideTarget: v.String("Boot/BootSourceOverrideTarget"),
				BootSourceOverrideMode: v.String("Boot/BootSourceOverrideMode"),
			}
			defer h.described.forget()
			detail := fmt.Sprintf("enabled %q, target %q, mode %q", to.BootSourceOverrideEnabled, to.BootSourceOverrideTarget, to.BootSourceOverrideMode)
			return refusal(h.o.Agent.Control(r.Context(), "boot device", detail, r.Caller.User, func(ctx context.Context) error {
				return h.o.Controller.SetBoot(ctx, to)
			}))
		},
	}
}

const mediaURI = systemURI + "/VirtualMedia"

// media are the virtual drives of the host's service processor.
func (h *host) media() []service.Route {
	if h.o.Controller == nil {
		return nil
	}
	return []service.Route{
		{
			URI: mediaURI, Type: schema.TypeVirtualMediaCollection, Name: "Virtual media of the host's service processor",
			Members: func(r *service.Request) (ids []string, err error) {
				for _, m := range h.machine(r.Context()).Media {
					ids = append(ids, m.ID)
				}
				return ids, nil
			},
		},
		{
			URI: mediaURI + "/{drive}", Type: schema.TypeVirtualMedia, Get: func(r *service.Request) (schema.Object, error) { return h.drive(r) },
			Actions: []service.Action{
				{
					Name: "VirtualMedia.InsertMedia",
					Parameters: []service.Property{
						{Name: "Image", Kind: service.String, Required: true, Min: 1, Max: 2048},
						{Name: "Inserted", Kind: service.Boolean},
						{Name: "WriteProtected", Kind: service.Boolean},
						{Name: "TransferMethod", Kind: service.String, Values: []string{"Stream", "Upload"}},
						{Name: "TransferProtocolType", Kind: service.String, Values: []string{"CIFS", "FTP", "SFTP", "HTTP", "HTTPS", "NFS", "SCP", "TFTP"}},
						{Name: "UserName", Kind: service.String, Max: 256},
						{Name: "Password", Kind: service.String, Max: 256},
					},
					Do: h.insert,
				},
				{Name: "VirtualMedia.EjectMedia", Do: h.eject},
			},
		},
	}
}

// drive returns a virtual drive as the service processor has it, without what is its own: links and actions.
func (h *host) drive(r *service.Request) (*schema.VirtualMedia, error) {
	all := h.machine(r.Context()).Media
	i := slices.IndexFunc(all, func(m schema.VirtualMedia) bool { return m.ID == r.Param("drive") })
	if i < 0 {
		return nil, service.ErrNotFound
	}
	out := all[i]
	out.Resource = schema.Resource{Name: out.Name, Description: out.Description}
	return &out, nil
}

func (h *host) insert(r *service.Request, v service.Values) (*service.Reply, error) {
	m := Insertion{
		Image: v.String("Image"), TransferMethod: v.String("TransferMethod"), TransferProtocolType: v.String("TransferProtocolType"),
		UserName: v.String("UserName"), Password: v.String("Password"),
	}
	for name, to := range map[string]**bool{"Inserted": &m.Inserted, "WriteProtected": &m.WriteProtected} {
		if v.Has(name) {
			b := v.Bool(name)
			*to = &b
		}
	}
	return nil, h.lend(r, "insert media", m.Image, func(ctx context.Context, id string) error { return h.o.Controller.InsertMedia(ctx, id, m) })
}

func (h *host) eject(r *service.Request, _ service.Values) (*service.Reply, error) {
	return nil, h.lend(r, "eject media", "", h.o.Controller.EjectMedia)
}

// lend has something done to the virtual drive of the request.
func (h *host) lend(r *service.Request, what, image string, do func(ctx context.Context, id string) error) error {
	if _, err := h.drive(r); err != nil {
		return err
	}
	id := r.Param("drive")
	defer h.described.forget()
	detail := "drive " + id
	if image != "" {
		detail += ", image " + redacted(image)
	}
	return refusal(h.o.Agent.Control(r.Context(), what, detail, r.Caller.User, func(ctx context.Context) error { return do(ctx, id) }))
}

// redacted is an image's URI without what may be a secret.
func redacted(image string) string {
	u, err := url.Parse(image)
	if err != nil {
		return "with an address that is no URI"
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}
