package schema

// The resources that describe a machine: what it is made of, what runs on it, and what its controller can lend it.

// Types of the resources of a machine.
const (
	TypeOperatingSystem       = "OperatingSystem.v1_0_2.OperatingSystem"
	TypeMemory                = "Memory.v1_23_0.Memory"
	TypeMemoryMetrics         = "MemoryMetrics.v1_8_0.MemoryMetrics"
	TypeSimpleStorage         = "SimpleStorage.v1_3_2.SimpleStorage"
	TypeProcessor             = "Processor.v1_22_0.Processor"
	TypeEthernetInterface     = "EthernetInterface.v1_12_4.EthernetInterface"
	TypeVirtualMedia          = "VirtualMedia.v1_6_5.VirtualMedia"
	TypeManagerDiagnosticData = "ManagerDiagnosticData.v1_2_3.ManagerDiagnosticData"
	TypePCIeDevice            = "PCIeDevice.v1_21_0.PCIeDevice"
	TypePCIeFunction          = "PCIeFunction.v1_7_0.PCIeFunction"
	TypeNetworkAdapter        = "NetworkAdapter.v1_14_0.NetworkAdapter"
	TypePort                  = "Port.v1_18_0.Port"
	TypePortMetrics           = "PortMetrics.v1_8_1.PortMetrics"

	TypeNetworkDeviceFunction        = "NetworkDeviceFunction.v1_11_1.NetworkDeviceFunction"
	TypeNetworkDeviceFunctionMetrics = "NetworkDeviceFunctionMetrics.v1_2_0.NetworkDeviceFunctionMetrics"

	TypeProcessorCollection         = "ProcessorCollection.ProcessorCollection"
	TypeMemoryCollection            = "MemoryCollection.MemoryCollection"
	TypeSimpleStorageCollection     = "SimpleStorageCollection.SimpleStorageCollection"
	TypeEthernetInterfaceCollection = "EthernetInterfaceCollection.EthernetInterfaceCollection"
	TypeVirtualMediaCollection      = "VirtualMediaCollection.VirtualMediaCollection"
	TypeNetworkAdapterCollection    = "NetworkAdapterCollection.NetworkAdapterCollection"
	TypePortCollection              = "PortCollection.PortCollection"
	TypePCIeDeviceCollection        = "PCIeDeviceCollection.PCIeDeviceCollection"
	TypePCIeFunctionCollection      = "PCIeFunctionCollection.PCIeFunctionCollection"

	TypeNetworkDeviceFunctionCollection = "NetworkDeviceFunctionCollection.NetworkDeviceFunctionCollection"
)

// OperatingSystem is OperatingSystem.v1_0_2.OperatingSystem.
type OperatingSystem struct {
	Resource
	Type          string    `json:"Type,omitempty"` // Linux
	Kernel        *OSKernel `json:"Kernel,omitempty"`
	UptimeSeconds *int64    `json:"UptimeSeconds,omitempty"`
	Status        *Status   `json:"Status,omitempty"`
}

// OSKernel is OperatingSystem.v1_0_2.Kernel: what uname(1) tells.
type OSKernel struct {
	Name    string `json:"Name,omitempty"`    // uname -s
	Release string `json:"Release,omitempty"` // uname -r
	Version string `json:"Version,omitempty"` // uname -v
	Machine string `json:"Machine,omitempty"` // uname -m
}

// Processor is Processor.v1_22_0.Processor.
type Processor struct {
	Resource
	Socket                string       `json:"Socket,omitempty"`
	ProcessorType         string       `json:"ProcessorType,omitempty"`         // CPU
	ProcessorArchitecture string       `json:"ProcessorArchitecture,omitempty"` // x86, ARM
	InstructionSet        string       `json:"InstructionSet,omitempty"`        // x86-64, ARM-A64
	Manufacturer          string       `json:"Manufacturer,omitempty"`
	Model                 string       `json:"Model,omitempty"`
	ProcessorID           *ProcessorID `json:"ProcessorId,omitempty"`
	TotalCores            int          `json:"TotalCores,omitempty"`
	TotalThreads          int          `json:"TotalThreads,omitempty"`
	Status                *Status      `json:"Status,omitempty"`
}

// ProcessorID is Processor.v1_22_0.ProcessorId.
type ProcessorID struct {
	VendorID        string `json:"VendorId,omitempty"`
	EffectiveFamily string `json:"EffectiveFamily,omitempty"`
	EffectiveModel  string `json:"EffectiveModel,omitempty"`
}

// Memory is Memory.v1_23_0.Memory: a module, or the slot for one.
type Memory struct {
	Resource
	MemoryType       string            `json:"MemoryType,omitempty"`       // DRAM
	MemoryDeviceType string            `json:"MemoryDeviceType,omitempty"` // DDR4, DDR5, …
	CapacityMiB      *int64            `json:"CapacityMiB,omitempty"`
	Location         *PhysicalLocation `json:"Location,omitempty"`
	Metrics          *Link             `json:"Metrics,omitempty"`
	Status           *Status           `json:"Status,omitempty"`
}

// MemoryMetrics is MemoryMetrics.v1_8_0.MemoryMetrics: of a module, or of all memory.
type MemoryMetrics struct {
	Resource
	CurrentPeriod *MemoryPeriod `json:"CurrentPeriod,omitempty"`
}

// MemoryPeriod is MemoryMetrics.v1_8_0.CurrentPeriod: what was counted since the counters were last reset.
type MemoryPeriod struct {
	Correctable   uint64 `json:"CorrectableECCErrorCount"`
	Uncorrectable uint64 `json:"UncorrectableECCErrorCount"`
}

// SimpleStorage is SimpleStorage.v1_3_2.SimpleStorage: disks, and nothing of how they are attached.
type SimpleStorage struct {
	Resource
	Devices []StorageDevice `json:"Devices"`
	Status  *Status         `json:"Status,omitempty"`
}

// StorageDevice is SimpleStorage.v1_3_2.Device.
type StorageDevice struct {
	Name          string  `json:"Name"`
	CapacityBytes uint64  `json:"CapacityBytes"`
	Status        *Status `json:"Status,omitempty"`
}

// PCIeDevice is PCIeDevice.v1_21_0.PCIeDevice: a device on a PCI bus.
type PCIeDevice struct {
	Resource
	DeviceType string  `json:"DeviceType"` // SingleFunction, MultiFunction
	Functions  *Link   `json:"PCIeFunctions"`
	Status     *Status `json:"Status,omitempty"`
}

// PCIeFunction is PCIeFunction.v1_7_0.PCIeFunction. Numbers are hexadecimal, with 0x before them.
type PCIeFunction struct {
	Resource
	FunctionID        int                `json:"FunctionId"`
	FunctionType      string             `json:"FunctionType"` // Physical, Virtual
	DeviceClass       string             `json:"DeviceClass,omitempty"`
	ClassCode         string             `json:"ClassCode"`
	VendorID          string             `json:"VendorId"`
	DeviceID          string             `json:"DeviceId"`
	RevisionID        string             `json:"RevisionId"`
	SubsystemVendorID string             `json:"SubsystemVendorId,omitempty"`
	SubsystemID       string             `json:"SubsystemId,omitempty"`
	Status            *Status            `json:"Status,omitempty"`
	Links             *PCIeFunctionLinks `json:"Links,omitempty"`
}

// PCIeFunctionLinks are the related resources of a PCI function.
type PCIeFunctionLinks struct {
	Device *Link `json:"PCIeDevice"`
}

// PhysicalLocation is Resource.v1_20_0.Location.
type PhysicalLocation struct {
	PartLocation *PartLocation `json:"PartLocation,omitempty"`
}

// PartLocation is Resource.v1_20_0.PartLocation.
type PartLocation struct {
	ServiceLabel string `json:"ServiceLabel,omitempty"`
	LocationType string `json:"LocationType,omitempty"` // Slot, …
}

// EthernetInterface is EthernetInterface.v1_12_4.EthernetInterface.
type EthernetInterface struct {
	Resource
	MACAddress       string   `json:"MACAddress,omitempty"`
	MTUSize          int      `json:"MTUSize,omitempty"`
	SpeedMbps        *int     `json:"SpeedMbps"` // null where it is not known
	FullDuplex       *bool    `json:"FullDuplex,omitempty"`
	InterfaceEnabled *bool    `json:"InterfaceEnabled,omitempty"`
	LinkStatus       string   `json:"LinkStatus,omitempty"` // LinkUp, LinkDown
	HostName         string   `json:"HostName,omitempty"`
	FQDN             *string  `json:"FQDN"` // null where there is none
	NameServers      []string `json:"NameServers,omitzero"`
	// What is configured, as opposed to what is in use.
	StaticNameServers   []string      `json:"StaticNameServers,omitzero"`
	IPv4StaticAddresses []IPv4Address `json:"IPv4StaticAddresses,omitzero"`
	DHCPv4              *DHCPv4       `json:"DHCPv4,omitempty"`
	IPv4Addresses       []IPv4Address `json:"IPv4Addresses,omitzero"`
	IPv6Addresses       []IPv6Address `json:"IPv6Addresses,omitzero"`
	Status              *Status       `json:"Status,omitempty"`
}

// DHCPv4 is EthernetInterface.v1_12_4.DHCPv4Configuration.
type DHCPv4 struct {
	DHCPEnabled bool `json:"DHCPEnabled"`
}

// IPv4Address is IPAddresses.v1_1_5.IPv4Address.
type IPv4Address struct {
	WriteableProperties []string `json:"@Redfish.WriteableProperties,omitempty"`
	Address             string   `json:"Address,omitempty"`
	SubnetMask          string   `json:"SubnetMask,omitempty"`
	AddressOrigin       *string  `json:"AddressOrigin"` // Static, DHCP; null where it is not known
	Gateway             *string  `json:"Gateway"`       // null where there is none
}

// IPv6Address is IPAddresses.v1_1_5.IPv6Address.
type IPv6Address struct {
	Address       string  `json:"Address,omitempty"`
	PrefixLength  int     `json:"PrefixLength,omitempty"`
	AddressOrigin *string `json:"AddressOrigin"` // null where it is not known
	AddressState  *string `json:"AddressState"`  // Preferred; null where it is not known
}

// VirtualMedia is VirtualMedia.v1_6_5.VirtualMedia.
type VirtualMedia struct {
	Resource
	MediaTypes           []string `json:"MediaTypes,omitempty"` // CD, DVD, USBStick, Floppy
	Image                *string  `json:"Image"`                // URI; null while nothing is inserted
	ImageName            *string  `json:"ImageName"`
	Inserted             *bool    `json:"Inserted,omitempty"`
	WriteProtected       *bool    `json:"WriteProtected,omitempty"`
	ConnectedVia         string   `json:"ConnectedVia,omitempty"`         // NotConnected, URI
	TransferMethod       string   `json:"TransferMethod,omitempty"`       // Stream, Upload
	TransferProtocolType string   `json:"TransferProtocolType,omitempty"` // HTTP, HTTPS, …
	Status               *Status  `json:"Status,omitempty"`
}

// ManagerDiagnosticData is ManagerDiagnosticData.v1_2_3.ManagerDiagnosticData.
type ManagerDiagnosticData struct {
	Resource
	FreeStorageSpaceKiB      *int64               `json:"FreeStorageSpaceKiB,omitempty"`
	MemoryStatistics         *MemoryStatistics    `json:"MemoryStatistics,omitempty"`
	ProcessorStatistics      *ProcessorStatistics `json:"ProcessorStatistics,omitempty"`
	ServiceRootUptimeSeconds *float64             `json:"ServiceRootUptimeSeconds,omitempty"`
	TopProcesses             []ProcessStatistics  `json:"TopProcesses,omitempty"`
}

// ProcessStatistics is ManagerDiagnosticData.v1_2_3.ProcessStatistics.
type ProcessStatistics struct {
	CommandLine          string  `json:"CommandLine"`
	ResidentSetSizeBytes int64   `json:"ResidentSetSizeBytes"`
	UserTimeSeconds      float64 `json:"UserTimeSeconds"`
	KernelTimeSeconds    float64 `json:"KernelTimeSeconds"`
}

// MemoryStatistics is ManagerDiagnosticData.v1_2_3.MemoryStatistics; as free(1) tells.
type MemoryStatistics struct {
	TotalBytes           int64 `json:"TotalBytes"`
	UsedBytes            int64 `json:"UsedBytes"`
	FreeBytes            int64 `json:"FreeBytes"`
	SharedBytes          int64 `json:"SharedBytes"`
	BuffersAndCacheBytes int64 `json:"BuffersAndCacheBytes"`
	AvailableBytes       int64 `json:"AvailableBytes"`
}

// ProcessorStatistics is ManagerDiagnosticData.v1_2_3.ProcessorStatistics.
type ProcessorStatistics struct {
	KernelPercent float64 `json:"KernelPercent"`
	UserPercent   float64 `json:"UserPercent"`
}

// NetworkAdapter is NetworkAdapter.v1_14_0.NetworkAdapter.
type NetworkAdapter struct {
	Resource
	Manufacturer string  `json:"Manufacturer,omitempty"`
	Model        string  `json:"Model,omitempty"`
	Ports        *Link   `json:"Ports,omitempty"`
	Functions    *Link   `json:"NetworkDeviceFunctions,omitempty"`
	Status       *Status `json:"Status,omitempty"`
}

// NetworkDeviceFunction is NetworkDeviceFunction.v1_11_1.NetworkDeviceFunction.
type NetworkDeviceFunction struct {
	Resource
	NetDevFuncType string                      `json:"NetDevFuncType,omitempty"` // Ethernet
	DeviceEnabled  *bool                       `json:"DeviceEnabled,omitempty"`
	Limits         []NetworkLimit              `json:"Limits,omitempty"`
	Metrics        *Link                       `json:"Metrics,omitempty"`
	Links          *NetworkDeviceFunctionLinks `json:"Links,omitempty"`
	Status         *Status                     `json:"Status,omitempty"`
}

// NetworkLimit is NetworkDeviceFunction.v1_11_1.Limit.
type NetworkLimit struct {
	Direction               string `json:"Direction"` // Ingress, Egress
	SustainedBytesPerSecond uint64 `json:"SustainedBytesPerSecond"`
	BurstBytesPerSecond     uint64 `json:"BurstBytesPerSecond"`
}

// NetworkDeviceFunctionLinks is NetworkDeviceFunction.v1_11_1.Links.
type NetworkDeviceFunctionLinks struct {
	PhysicalNetworkPortAssignment *Link `json:"PhysicalNetworkPortAssignment,omitempty"`
}

// NetworkDeviceFunctionMetrics is NetworkDeviceFunctionMetrics.v1_2_0.NetworkDeviceFunctionMetrics.
type NetworkDeviceFunctionMetrics struct {
	Resource
	RXFrames uint64 `json:"RXFrames"`
	RXBytes  uint64 `json:"RXBytes"`
	TXFrames uint64 `json:"TXFrames"`
	TXBytes  uint64 `json:"TXBytes"`
}

// PortMetrics is PortMetrics.v1_8_1.PortMetrics.
type PortMetrics struct {
	Resource
	RXBytes    uint64          `json:"RXBytes"`
	TXBytes    uint64          `json:"TXBytes"`
	Networking *PortNetworking `json:"Networking,omitempty"`
}

// PortNetworking is PortMetrics.v1_8_1.Networking.
type PortNetworking struct {
	RXFrames   uint64 `json:"RXFrames"`
	TXFrames   uint64 `json:"TXFrames"`
	RXDiscards uint64 `json:"RXDiscards"`
}

// Port is Port.v1_18_0.Port.
type Port struct {
	Resource
	PortID           string        `json:"PortId,omitempty"`
	PortProtocol     string        `json:"PortProtocol,omitempty"` // Ethernet
	InterfaceEnabled *bool         `json:"InterfaceEnabled,omitempty"`
	LinkStatus       string        `json:"LinkStatus,omitempty"` // LinkUp, LinkDown
	CurrentSpeedGbps *float64      `json:"CurrentSpeedGbps,omitempty"`
	MaxFrameSize     int           `json:"MaxFrameSize,omitempty"`
	Ethernet         *PortEthernet `json:"Ethernet,omitempty"`
	Metrics          *Link         `json:"Metrics,omitempty"`
	Status           *Status       `json:"Status,omitempty"`
}

// PortEthernet is Port.v1_18_0.EthernetProperties.
type PortEthernet struct {
	AssociatedMACAddresses []string `json:"AssociatedMACAddresses,omitempty"`
}
