package service

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Power is what a BMC can do to the machine that it manages.
type Power interface {
	// State returns PowerOn, PowerOff or one of the values between.
	State(context.Context) (schema.PowerState, error)
	// Types are the reset types that Reset takes.
	Types() []schema.ResetType
	// Reset returns when the reset was carried out or, for a request to the operating system, was passed on.
	Reset(context.Context, schema.ResetType) error
}

// BootDevice is the ability of a Power to choose what the machine boots from.
type BootDevice interface {
	// Boot returns the present override: enabled is "Disabled", "Once" or "Continuous"; target "None", "Pxe", "Hdd", "Cd" …; mode "UEFI" or "Legacy".
	Boot(context.Context) (enabled, target, mode string, err error)
	SetBoot(ctx context.Context, enabled, target, mode string) error
	// Targets are the targets that SetBoot takes, "None" among them.
	Targets() []string
}

// Media is the ability of a Power to put images into virtual drives of the machine.
type Media interface {
	// Drives are the Ids of the drives; all of them take CDs and DVDs.
	Drives() []string
	// Image is what is in a drive; empty if nothing is.
	Image(drive string) string
	// Insert puts the image at a URI into a drive, which the machine can read only.
	Insert(ctx context.Context, drive, uri string) error
	Eject(ctx context.Context, drive string) error
}

// BMCOptions describe a machine and its BMC. Only Power is required; what is not given is absent from the resources.
type BMCOptions struct {
	Power Power
	// ResetBMC restarts the management controller itself.
	ResetBMC func(ctx context.Context, graceful bool) error

	Manufacturer, Model, SerialNumber string // of the machine
	UUID                              string // of the machine, as its SMBIOS tells
	BMCModel, BMCVersion              string
	MemoryGiB                         float64
	Processors                        int // logical
}

// BMC returns the resources of a plain baseboard management controller for one machine: Systems/system, Managers/bmc and
// Chassis/1. These Ids are the ones that widespread clients (bmclib's inventory, for one) know.
func BMC(s *Service, o BMCOptions) []Route {
	boot, bootable := o.Power.(BootDevice)
	drives, lends := o.Power.(Media)
	types := func() (names []string) {
		for _, t := range o.Power.Types() {
			names = append(names, string(t))
		}
		return names
	}
	power := func(r *Request) (schema.PowerState, *schema.Status) {
		state, err := o.Power.State(r.Context())
		if err != nil {
			s.log.Warn("read power state", "err", err)
			return "", &schema.Status{State: schema.StateUnavailableOffline}
		}
		if state == schema.PowerOff {
			return state, &schema.Status{State: schema.StateDisabled, Health: schema.HealthOK}
		}
		return state, &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK}
	}

	system := Route{
		URI:  "/redfish/v1/Systems/system",
		Type: schema.TypeComputerSystem,
		Get: func(r *Request) (schema.Object, error) {
			out := &schema.ComputerSystem{
				Resource:   schema.Resource{Name: "system", Description: "The managed machine"},
				SystemType: "Physical", Manufacturer: o.Manufacturer, Model: o.Model, SerialNumber: o.SerialNumber, UUID: o.UUID,
				Links: &schema.SystemLinks{
					Chassis:   []schema.Link{{ID: "/redfish/v1/Chassis/1"}},
					ManagedBy: []schema.Link{{ID: "/redfish/v1/Managers/bmc"}},
				},
			}
			out.PowerState, out.Status = power(r)
			if lends {
				out.VirtualMedia = schema.LinkTo(bmcMediaURI)
			}
			if o.MemoryGiB > 0 {
				out.MemorySummary = &schema.MemorySummary{TotalSystemMemoryGiB: o.MemoryGiB}
			}
			if o.Processors > 0 {
				out.ProcessorSummary = &schema.ProcessorSummary{LogicalProcessorCount: o.Processors}
			}
			if bootable {
				enabled, target, mode, err := boot.Boot(r.Context())
				if err != nil {
					s.log.Warn("read boot override", "err", err)
				} else {
					out.Boot = &schema.Boot{
						BootSourceOverrideEnabled: enabled, BootSourceOverrideEnabledAllowable: bootEnabled,
						BootSourceOverrideTarget: target, BootSourceOverrideTargetAllowable: boot.Targets(),
						BootSourceOverrideMode: mode, BootSourceOverrideModeAllowable: bootModes,
					}
				}
			}
			return out, nil
		},
		Actions: []Action{{
			Name:       "ComputerSystem.Reset",
			Parameters: []Property{{Name: "ResetType", Kind: String, Required: true, Allowed: func(*Request) []string { return types() }}},
			Do: func(r *Request, v Values) (*Reply, error) {
				return nil, o.Power.Reset(r.Context(), schema.ResetType(v.String("ResetType")))
			},
		}},
	}
	if bootable {
		system.Patch = &Patch{
			Properties: []Property{
				{Name: "Boot/BootSourceOverrideEnabled", Kind: String, Values: bootEnabled},
				{Name: "Boot/BootSourceOverrideTarget", Kind: String, Allowed: func(*Request) []string { return boot.Targets() }},
				{Name: "Boot/BootSourceOverrideMode", Kind: String, Values: bootModes},
			},
			Do: func(r *Request, v Values) error {
				enabled, target, mode, err := boot.Boot(r.Context())
				if err != nil {
					return err
				}
				for name, p := range map[string]*string{"Enabled": &enabled, "Target": &target, "Mode": &mode} {
					if name = "Boot/BootSourceOverride" + name; v.Has(name) {
						*p = v.String(name)
					}
				}
				return boot.SetBoot(r.Context(), enabled, target, mode)
			},
		}
	}

	manager := Route{
		URI:  "/redfish/v1/Managers/bmc",
		Type: schema.TypeManager,
		Get: func(r *Request) (schema.Object, error) {
			return &schema.Manager{
				Resource:    schema.Resource{Name: "bmc", Description: "The management controller"},
				ManagerType: "BMC", UUID: s.UUID(), ServiceEntryPointUUID: s.UUID(), Model: o.BMCModel, FirmwareVersion: o.BMCVersion,
				DateTime: schema.Time(s.now()), DateTimeLocalOffset: "+00:00", LastResetTime: schema.Time(s.started),
				NetworkProtocol: schema.LinkTo("/redfish/v1/Managers/bmc/NetworkProtocol"),
				PowerState:      schema.PowerOn, Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
				Links: &schema.ManagerLinks{
					ManagerForServers: []schema.Link{{ID: "/redfish/v1/Systems/system"}},
					ManagerForChassis: []schema.Link{{ID: "/redfish/v1/Chassis/1"}},
					ManagerInChassis:  schema.LinkTo("/redfish/v1/Chassis/1"),
				},
			}, nil
		},
	}
	if o.ResetBMC != nil {
		manager.Actions = []Action{ManagerReset(o.ResetBMC)}
	}

	routes := s.NetworkRoutes("/redfish/v1/Managers/bmc")
	if lends {
		routes = append(routes, mediaRoutes(drives)...)
	}
	return append(routes, []Route{
		{URI: "/redfish/v1/Systems", Type: schema.TypeComputerSystemCollection, Name: "Computer Systems", Members: Fixed("system")},
		system,
		{URI: "/redfish/v1/Managers", Type: schema.TypeManagerCollection, Name: "Managers", Members: Fixed("bmc")},
		manager,
		{URI: "/redfish/v1/Chassis", Type: schema.TypeChassisCollection, Name: "Chassis", Members: Fixed("1")},
		{
			URI:  "/redfish/v1/Chassis/1",
			Type: schema.TypeChassis,
			Get: func(r *Request) (schema.Object, error) {
				out := &schema.Chassis{
					Resource:    schema.Resource{Name: "Chassis", Description: "The enclosure of the managed machine"},
					ChassisType: "RackMount", Manufacturer: o.Manufacturer, Model: o.Model, SerialNumber: o.SerialNumber,
					Links: &schema.ChassisLinks{
						ComputerSystems:   []schema.Link{{ID: "/redfish/v1/Systems/system"}},
						ManagedBy:         []schema.Link{{ID: "/redfish/v1/Managers/bmc"}},
						ManagersInChassis: []schema.Link{{ID: "/redfish/v1/Managers/bmc"}},
					},
				}
				out.PowerState, out.Status = power(r)
				return out, nil
			},
		},
	}...)
}

var (
	bootEnabled = []string{"Disabled", "Once", "Continuous"}
	bootModes   = []string{"UEFI", "Legacy"}
)

// Fixed returns the Members of a collection that never changes.
func Fixed(ids ...string) func(*Request) ([]string, error) {
	return func(*Request) ([]string, error) { return slices.Clone(ids), nil }
}

// ManagerReset is the action Manager.Reset. The reset happens half a second after the answer has left.
func ManagerReset(reset func(ctx context.Context, graceful bool) error) Action {
	return Action{
		Name:       "Manager.Reset",
		Parameters: []Property{{Name: "ResetType", Kind: String, Values: []string{"GracefulRestart", "ForceRestart"}}},
		Do: func(r *Request, v Values) (*Reply, error) {
			graceful := v.String("ResetType") != "ForceRestart"
			ctx := context.WithoutCancel(r.Context())
			log := r.svc.log
			time.AfterFunc(500*time.Millisecond, func() {
				if err := reset(ctx, graceful); err != nil && !errors.Is(err, context.Canceled) {
					log.Error("reset manager", "err", err)
				}
			})
			return nil, nil
		},
	}
}
