package schema

// ServiceRoot is ServiceRoot.v1_20_0.ServiceRoot.
type ServiceRoot struct {
	Resource
	RedfishVersion            string                     `json:"RedfishVersion"`
	UUID                      string                     `json:"UUID,omitempty"`
	Product                   string                     `json:"Product,omitempty"`
	Vendor                    string                     `json:"Vendor,omitempty"`
	ServiceIdentification     string                     `json:"ServiceIdentification,omitempty"`
	ProtocolFeaturesSupported *ProtocolFeaturesSupported `json:"ProtocolFeaturesSupported,omitempty"`
	Systems                   *Link                      `json:"Systems,omitempty"`
	Managers                  *Link                      `json:"Managers,omitempty"`
	Chassis                   *Link                      `json:"Chassis,omitempty"`
	Tasks                     *Link                      `json:"Tasks,omitempty"`
	SessionService            *Link                      `json:"SessionService,omitempty"`
	AccountService            *Link                      `json:"AccountService,omitempty"`
	EventService              *Link                      `json:"EventService,omitempty"`
	UpdateService             *Link                      `json:"UpdateService,omitempty"`
	CertificateService        *Link                      `json:"CertificateService,omitempty"`
	ComponentIntegrity        *Link                      `json:"ComponentIntegrity,omitempty"`
	ServiceConditions         *Link                      `json:"ServiceConditions,omitempty"`
	TelemetryService          *Link                      `json:"TelemetryService,omitempty"`
	Registries                *Link                      `json:"Registries,omitempty"`
	JSONSchemas               *Link                      `json:"JsonSchemas,omitempty"`
	Links                     ServiceRootLinks           `json:"Links"`
	OEM                       OEM                        `json:"Oem,omitempty"`
}

// ServiceRootLinks are the related resources of a service root.
type ServiceRootLinks struct {
	Sessions                *Link `json:"Sessions,omitempty"`
	ManagerProvidingService *Link `json:"ManagerProvidingService,omitempty"`
}

// ProtocolFeaturesSupported tells which query options a service has.
type ProtocolFeaturesSupported struct {
	ExpandQuery          ExpandQuery `json:"ExpandQuery"`
	FilterQuery          bool        `json:"FilterQuery"`
	SelectQuery          bool        `json:"SelectQuery"`
	OnlyMemberQuery      bool        `json:"OnlyMemberQuery"`
	ExcerptQuery         bool        `json:"ExcerptQuery"`
	TopSkipQuery         bool        `json:"TopSkipQuery"`
	MultipleHTTPRequests bool        `json:"MultipleHTTPRequests"`
	IncludeOriginOfCond  *bool       `json:"IncludeOriginOfConditionQuery,omitempty"`
	DeepOperations       *struct{}   `json:"DeepOperations,omitempty"`
}

// ExpandQuery tells how $expand is supported.
type ExpandQuery struct {
	ExpandAll bool `json:"ExpandAll"`
	Levels    bool `json:"Levels"`
	Links     bool `json:"Links"`
	NoLinks   bool `json:"NoLinks"`
	MaxLevels int  `json:"MaxLevels,omitempty"`
}

// ComputerSystem is ComputerSystem.v1_27_0.ComputerSystem.
type ComputerSystem struct {
	Resource
	SystemType       string            `json:"SystemType,omitempty"`
	Manufacturer     string            `json:"Manufacturer,omitempty"`
	Model            string            `json:"Model,omitempty"`
	SerialNumber     string            `json:"SerialNumber,omitempty"`
	UUID             string            `json:"UUID,omitempty"`
	HostName         string            `json:"HostName,omitempty"`
	PowerState       PowerState        `json:"PowerState,omitempty"`
	Status           *Status           `json:"Status,omitempty"`
	SKU              string            `json:"SKU,omitempty"`
	PartNumber       string            `json:"PartNumber,omitempty"`
	BIOSVersion      string            `json:"BiosVersion,omitempty"`
	LastResetTime    string            `json:"LastResetTime,omitempty"`
	Boot             *Boot             `json:"Boot,omitempty"`
	BootProgress     *BootProgress     `json:"BootProgress,omitempty"`
	ProcessorSummary *ProcessorSummary `json:"ProcessorSummary,omitempty"`
	MemorySummary    *MemorySummary    `json:"MemorySummary,omitempty"`
	Processors       *Link             `json:"Processors,omitempty"`
	Memory           *Link             `json:"Memory,omitempty"`
	SimpleStorage    *Link             `json:"SimpleStorage,omitempty"`
	EthernetIfaces   *Link             `json:"EthernetInterfaces,omitempty"`
	VirtualMedia     *Link             `json:"VirtualMedia,omitempty"`
	PCIeDevices      []Link            `json:"PCIeDevices,omitempty"`
	LogServices      *Link             `json:"LogServices,omitempty"`
	Watchdog         *WatchdogTimer    `json:"HostWatchdogTimer,omitempty"`
	Links            *SystemLinks      `json:"Links,omitempty"`
	OEM              OEM               `json:"Oem,omitempty"`
}

// WatchdogTimer is ComputerSystem.v1_27_0.WatchdogTimer.
type WatchdogTimer struct {
	FunctionEnabled bool    `json:"FunctionEnabled"`
	TimeoutAction   string  `json:"TimeoutAction"` // None, ResetSystem, PowerCycle, PowerDown, OEM
	WarningAction   string  `json:"WarningAction,omitempty"`
	Status          *Status `json:"Status"`
}

// SystemLinks are the related resources of a computer system.
type SystemLinks struct {
	Chassis   []Link `json:"Chassis,omitempty"`
	ManagedBy []Link `json:"ManagedBy,omitempty"`
	OEM       OEM    `json:"Oem,omitempty"`
}

// Boot is ComputerSystem.v1_27_0.Boot, without what concerns boot options.
type Boot struct {
	WriteableProperties                []string `json:"@Redfish.WriteableProperties,omitempty"`
	BootSourceOverrideEnabled          string   `json:"BootSourceOverrideEnabled,omitempty"` // Disabled, Once, Continuous
	BootSourceOverrideEnabledAllowable []string `json:"BootSourceOverrideEnabled@Redfish.AllowableValues,omitempty"`
	BootSourceOverrideTarget           string   `json:"BootSourceOverrideTarget,omitempty"` // None, Pxe, Hdd, Cd, …
	BootSourceOverrideTargetAllowable  []string `json:"BootSourceOverrideTarget@Redfish.AllowableValues,omitempty"`
	BootSourceOverrideMode             string   `json:"BootSourceOverrideMode,omitempty"` // Legacy, UEFI
	BootSourceOverrideModeAllowable    []string `json:"BootSourceOverrideMode@Redfish.AllowableValues,omitempty"`
}

// BootSettings are the members of Boot that a client may set.
var BootSettings = []string{"BootSourceOverrideEnabled", "BootSourceOverrideTarget", "BootSourceOverrideMode"}

// BootProgress is ComputerSystem.v1_27_0.BootProgress.
type BootProgress struct {
	LastState     string `json:"LastState,omitempty"` // None, OSBootStarted, OSRunning, …
	LastStateTime string `json:"LastStateTime,omitempty"`
	OEMLastState  string `json:"OemLastState,omitempty"`
}

// The values of BootProgress.LastState that the project uses.
const (
	BootNone          = "None"
	BootOSBootStarted = "OSBootStarted"
	BootOSRunning     = "OSRunning"
)

// ProcessorSummary is ComputerSystem.v1_27_0.ProcessorSummary.
type ProcessorSummary struct {
	Count                 int    `json:"Count,omitempty"`
	CoreCount             int    `json:"CoreCount,omitempty"`
	LogicalProcessorCount int    `json:"LogicalProcessorCount,omitempty"`
	Model                 string `json:"Model,omitempty"`
}

// MemorySummary is ComputerSystem.v1_27_0.MemorySummary.
type MemorySummary struct {
	TotalSystemMemoryGiB float64 `json:"TotalSystemMemoryGiB,omitempty"`
	Metrics              *Link   `json:"Metrics,omitempty"`
}

// Manager is Manager.v1_24_0.Manager.
type Manager struct {
	Resource
	ManagerType           string        `json:"ManagerType,omitempty"`
	UUID                  string        `json:"UUID,omitempty"`
	ServiceEntryPointUUID string        `json:"ServiceEntryPointUUID,omitempty"`
	Manufacturer          string        `json:"Manufacturer,omitempty"`
	Model                 string        `json:"Model,omitempty"`
	FirmwareVersion       string        `json:"FirmwareVersion,omitempty"`
	DateTime              string        `json:"DateTime,omitempty"`
	DateTimeLocalOffset   string        `json:"DateTimeLocalOffset,omitempty"`
	LastResetTime         string        `json:"LastResetTime,omitempty"`
	NetworkProtocol       *Link         `json:"NetworkProtocol,omitempty"`
	PowerState            PowerState    `json:"PowerState,omitempty"`
	Status                *Status       `json:"Status,omitempty"`
	LogServices           *Link         `json:"LogServices,omitempty"`
	DiagnosticData        *Link         `json:"ManagerDiagnosticData,omitempty"`
	EthernetIfaces        *Link         `json:"EthernetInterfaces,omitempty"`
	VirtualMedia          *Link         `json:"VirtualMedia,omitempty"`
	Links                 *ManagerLinks `json:"Links,omitempty"`
	OEM                   OEM           `json:"Oem,omitempty"`
}

// ManagerLinks are the related resources of a manager.
type ManagerLinks struct {
	ManagerForServers []Link `json:"ManagerForServers,omitempty"`
	ManagerForChassis []Link `json:"ManagerForChassis,omitempty"`
	ManagerInChassis  *Link  `json:"ManagerInChassis,omitempty"`
}

// Chassis is Chassis.v1_28_0.Chassis.
type Chassis struct {
	Resource
	ChassisType  string        `json:"ChassisType"`
	Manufacturer string        `json:"Manufacturer,omitempty"`
	Model        string        `json:"Model,omitempty"`
	SerialNumber string        `json:"SerialNumber,omitempty"`
	SKU          string        `json:"SKU,omitempty"`
	PartNumber   string        `json:"PartNumber,omitempty"`
	UUID         string        `json:"UUID,omitempty"`
	PowerState   PowerState    `json:"PowerState,omitempty"`
	Status       *Status       `json:"Status,omitempty"`
	Adapters     *Link         `json:"NetworkAdapters,omitempty"`
	PCI          *Link         `json:"PCIeDevices,omitempty"`
	Trusted      *Link         `json:"TrustedComponents,omitempty"`
	Links        *ChassisLinks `json:"Links,omitempty"`
	OEM          OEM           `json:"Oem,omitempty"`
}

// ChassisLinks are the related resources of a chassis.
type ChassisLinks struct {
	ComputerSystems   []Link `json:"ComputerSystems,omitempty"`
	ManagedBy         []Link `json:"ManagedBy,omitempty"`
	ManagersInChassis []Link `json:"ManagersInChassis,omitempty"`
	ContainedBy       *Link  `json:"ContainedBy,omitempty"`
	Contains          []Link `json:"Contains,omitempty"`
}

// LogService is LogService.v1_9_0.LogService.
type LogService struct {
	Resource
	ServiceEnabled      bool     `json:"ServiceEnabled"`
	LogEntryType        string   `json:"LogEntryType,omitempty"` // Event, SEL, Multiple, OEM
	LogPurposes         []string `json:"LogPurposes,omitempty"`
	OverWritePolicy     string   `json:"OverWritePolicy,omitempty"` // Unknown, WrapsWhenFull, NeverOverWrites
	MaxNumberOfRecords  int      `json:"MaxNumberOfRecords,omitempty"`
	DateTime            string   `json:"DateTime,omitempty"`
	DateTimeLocalOffset string   `json:"DateTimeLocalOffset,omitempty"`
	Status              *Status  `json:"Status,omitempty"`
	Entries             *Link    `json:"Entries,omitempty"`

	DiagnosticDataDetails []DiagnosticDataDetails `json:"DiagnosticDataDetails,omitempty"`
}

// DiagnosticDataDetails is LogService.v1_9_0.DiagnosticDataDetails: one type of data that CollectDiagnosticData takes.
type DiagnosticDataDetails struct {
	DiagnosticDataType    string
	OEMDiagnosticDataType string `json:"OEMDiagnosticDataType,omitempty"`
}

// LogEntry is LogEntry.v1_21_0.LogEntry.
type LogEntry struct {
	Resource
	EntryType      string   `json:"EntryType"` // Event, SEL, Oem
	OEMRecordFmt   string   `json:"OemRecordFormat,omitempty"`
	Created        string   `json:"Created,omitempty"`
	Modified       string   `json:"Modified,omitempty"`
	EventTimestamp string   `json:"EventTimestamp,omitempty"`
	Severity       Health   `json:"Severity,omitempty"`
	Message        string   `json:"Message,omitempty"`
	MessageID      string   `json:"MessageId,omitempty"`
	MessageArgs    []string `json:"MessageArgs,omitempty"`
	Resolution     string   `json:"Resolution,omitempty"`
	Resolved       *bool    `json:"Resolved,omitempty"`
	// The data that the entry is about, to be downloaded.
	DiagnosticDataType    string         `json:"DiagnosticDataType,omitempty"`    // Manager, PreOS, OS, OEM
	OEMDiagnosticDataType string         `json:"OEMDiagnosticDataType,omitempty"` // for OEM, which
	AdditionalDataURI     string         `json:"AdditionalDataURI,omitempty"`
	AdditionalDataSize    int64          `json:"AdditionalDataSizeBytes,omitempty"`
	Links                 *LogEntryLinks `json:"Links,omitempty"`
	OEM                   OEM            `json:"Oem,omitempty"`
}

// LogEntryLinks are the related resources of a log entry.
type LogEntryLinks struct {
	OriginOfCondition *Link `json:"OriginOfCondition,omitempty"`
}

// TaskService is TaskService.v1_3_0.TaskService.
type TaskService struct {
	Resource
	ServiceEnabled                  bool    `json:"ServiceEnabled"`
	DateTime                        string  `json:"DateTime,omitempty"`
	CompletedTaskOverWritePolicy    string  `json:"CompletedTaskOverWritePolicy,omitempty"` // Manual, Oldest
	LifeCycleEventOnTaskStateChange bool    `json:"LifeCycleEventOnTaskStateChange"`
	Status                          *Status `json:"Status,omitempty"`
	Tasks                           *Link   `json:"Tasks,omitempty"`
}

// TaskState is Task.v1_7_4.TaskState.
type TaskState string

// The values of TaskState that the project uses.
const (
	TaskNew        TaskState = "New"
	TaskRunning    TaskState = "Running"
	TaskCancelling TaskState = "Cancelling"
	TaskCancelled  TaskState = "Cancelled"
	TaskCompleted  TaskState = "Completed"
	TaskException  TaskState = "Exception"
)

// Done reports whether a task in this state has ended.
func (s TaskState) Done() bool {
	switch s {
	case TaskCancelled, TaskCompleted, TaskException, "Killed", "Interrupted":
		return true
	}
	return false
}

// Task is Task.v1_7_4.Task.
type Task struct {
	Resource
	TaskState       TaskState    `json:"TaskState,omitempty"`
	TaskStatus      Health       `json:"TaskStatus,omitempty"`
	StartTime       string       `json:"StartTime,omitempty"`
	EndTime         string       `json:"EndTime,omitempty"`
	PercentComplete *int         `json:"PercentComplete,omitempty"`
	TaskMonitor     string       `json:"TaskMonitor,omitempty"`
	HidePayload     bool         `json:"HidePayload"`
	Payload         *TaskPayload `json:"Payload,omitempty"`
	Messages        []Message    `json:"Messages"`
	OEM             OEM          `json:"Oem,omitempty"`
}

// TaskPayload is the request that a task came from.
type TaskPayload struct {
	TargetURI     string   `json:"TargetUri,omitempty"`
	HTTPOperation string   `json:"HttpOperation,omitempty"`
	HTTPHeaders   []string `json:"HttpHeaders,omitempty"`
	JSONBody      string   `json:"JsonBody,omitempty"`
}

// SessionService is SessionService.v1_2_0.SessionService.
type SessionService struct {
	Resource
	ServiceEnabled bool    `json:"ServiceEnabled"`
	SessionTimeout int     `json:"SessionTimeout"` // seconds
	Status         *Status `json:"Status,omitempty"`
	Sessions       *Link   `json:"Sessions,omitempty"`
}

// Session is Session.v1_8_0.Session. Password is never sent by the service.
type Session struct {
	Resource
	UserName              string   `json:"UserName,omitempty"`
	Password              *string  `json:"Password"` // null in answers
	Roles                 []string `json:"Roles,omitempty"`
	ClientOriginIPAddress string   `json:"ClientOriginIPAddress,omitempty"`
	CreatedTime           string   `json:"CreatedTime,omitempty"`
	SessionType           string   `json:"SessionType,omitempty"`
	// ExtendedInfo is how a login says that the password must be changed.
	ExtendedInfo []Message `json:"@Message.ExtendedInfo,omitempty"`
}

// AccountService is AccountService.v1_18_1.AccountService.
type AccountService struct {
	Resource
	ServiceEnabled                  bool             `json:"ServiceEnabled"`
	MinPasswordLength               int              `json:"MinPasswordLength,omitempty"`
	MaxPasswordLength               int              `json:"MaxPasswordLength,omitempty"`
	AccountLockoutThreshold         int              `json:"AccountLockoutThreshold"`
	AccountLockoutDuration          int              `json:"AccountLockoutDuration"`          // seconds
	AccountLockoutCounterResetAfter int              `json:"AccountLockoutCounterResetAfter"` // seconds
	MultiFactorAuth                 *MultiFactorAuth `json:"MultiFactorAuth,omitempty"`
	HTTPBasicAuth                   string           `json:"HTTPBasicAuth,omitempty"`
	SupportedAccountTypes           []string         `json:"SupportedAccountTypes,omitempty"`
	Status                          *Status          `json:"Status,omitempty"`
	Accounts                        *Link            `json:"Accounts,omitempty"`
	Roles                           *Link            `json:"Roles,omitempty"`
}

// ManagerAccount is ManagerAccount.v1_14_1.ManagerAccount. Password is never sent by the service.
type ManagerAccount struct {
	Resource
	UserName               string        `json:"UserName"`
	Password               *string       `json:"Password"` // null in answers
	PasswordChangeRequired bool          `json:"PasswordChangeRequired"`
	RoleID                 string        `json:"RoleId"`
	Enabled                bool          `json:"Enabled"`
	Locked                 bool          `json:"Locked"`
	AccountTypes           []string      `json:"AccountTypes"`
	Links                  *AccountLinks `json:"Links,omitempty"`
}

// AccountLinks are the related resources of an account.
type AccountLinks struct {
	Role *Link `json:"Role,omitempty"`
}

// Role is Role.v1_3_3.Role.
type Role struct {
	Resource
	RoleID             string   `json:"RoleId,omitempty"`
	IsPredefined       bool     `json:"IsPredefined"`
	AssignedPrivileges []string `json:"AssignedPrivileges"`
	OEMPrivileges      []string `json:"OemPrivileges,omitempty"`
}

// MessageRegistryFile is MessageRegistryFile.v1_1_5.MessageRegistryFile.
type MessageRegistryFile struct {
	Resource
	Languages []string   `json:"Languages"`
	Registry  string     `json:"Registry"`
	Location  []Location `json:"Location"`
}

// JSONSchemaFile is JsonSchemaFile.v1_1_5.JsonSchemaFile.
type JSONSchemaFile struct {
	Resource
	Languages []string   `json:"Languages"`
	Schema    string     `json:"Schema"`
	Location  []Location `json:"Location"`
}

// Location is where a registry or a schema is to be found.
type Location struct {
	Language       string `json:"Language,omitempty"`
	URI            string `json:"Uri,omitempty"`
	PublicationURI string `json:"PublicationUri,omitempty"`
}

// ActionInfo is ActionInfo.v1_5_0.ActionInfo.
type ActionInfo struct {
	Resource
	Parameters []ActionParameter `json:"Parameters"`
}

// ActionParameter is ActionInfo.v1_5_0.Parameters.
type ActionParameter struct {
	Name            string   `json:"Name"`
	Required        bool     `json:"Required"`
	DataType        string   `json:"DataType,omitempty"` // Boolean, Number, NumberArray, String, StringArray, Object, ObjectArray
	AllowableValues []string `json:"AllowableValues,omitempty"`
	MinimumValue    *int64   `json:"MinimumValue,omitempty"`
	MaximumValue    *int64   `json:"MaximumValue,omitempty"`
}
