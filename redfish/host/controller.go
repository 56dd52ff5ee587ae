package host

import (
	"context"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Machine is what the host's own service processor tells of the host. What it does not tell is empty.
type Machine struct {
	Manufacturer, Model, SerialNumber, SKU, PartNumber, BIOSVersion string

	// Resets are the reset types that the service processor takes; nil if it does not say.
	Resets []schema.ResetType
	// Boot is its boot override with the values that it allows; nil if it has none.
	Boot *schema.Boot
	// Watchdog is the timer that restarts a host which no longer resets it; nil if the service processor has none.
	Watchdog *schema.WatchdogTimer
	// Media are its virtual drives with their Ids.
	Media []schema.VirtualMedia
}

// Controller is the host's service processor, as far as it does more than switching power.
type Controller interface {
	Describe(context.Context) (Machine, error)
	// SetBoot overrides what the host boots from next; an empty member of the three settings stays as it is.
	SetBoot(context.Context, schema.Boot) error
	InsertMedia(ctx context.Context, id string, m Insertion) error
	EjectMedia(ctx context.Context, id string) error
}

// Insertion is what is put into a virtual drive. Zero members are left to the service processor.
type Insertion struct {
	Image                string `json:"Image"` // URI
	Inserted             *bool  `json:"Inserted,omitempty"`
	WriteProtected       *bool  `json:"WriteProtected,omitempty"`
	TransferMethod       string `json:"TransferMethod,omitempty"`
	TransferProtocolType string `json:"TransferProtocolType,omitempty"`
	UserName             string `json:"UserName,omitempty"`
	Password             string `json:"Password,omitempty"`
}
