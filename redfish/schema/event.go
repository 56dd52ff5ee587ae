package schema

// EventService is EventService.v1_12_0.EventService.
type EventService struct {
	Resource
	ServiceEnabled                    bool                          `json:"ServiceEnabled"`
	DeliveryRetryAttempts             int                           `json:"DeliveryRetryAttempts"`
	DeliveryRetryIntervalSeconds      int                           `json:"DeliveryRetryIntervalSeconds"`
	EventFormatTypes                  []string                      `json:"EventFormatTypes,omitempty"`
	RegistryPrefixes                  []string                      `json:"RegistryPrefixes,omitempty"`
	ResourceTypes                     []string                      `json:"ResourceTypes,omitempty"`
	Severities                        []Health                      `json:"Severities,omitempty"`
	ExcludeMessageID                  bool                          `json:"ExcludeMessageId"`
	ExcludeRegistryPrefix             bool                          `json:"ExcludeRegistryPrefix"`
	IncludeOriginOfConditionSupported bool                          `json:"IncludeOriginOfConditionSupported"`
	OriginResourcesSupported          bool                          `json:"OriginResourcesSupported"`
	SubordinateResourcesSupported     bool                          `json:"SubordinateResourcesSupported"`
	ServerSentEventURI                string                        `json:"ServerSentEventUri,omitempty"`
	SSEFilterPropertiesSupported      *SSEFilterPropertiesSupported `json:"SSEFilterPropertiesSupported,omitempty"`
	Status                            *Status                       `json:"Status,omitempty"`
	Subscriptions                     *Link                         `json:"Subscriptions,omitempty"`
}

// SSEFilterPropertiesSupported tells what the $filter of a stream of events can look at.
type SSEFilterPropertiesSupported struct {
	EventFormatType        bool `json:"EventFormatType"`
	MessageID              bool `json:"MessageId"`
	MetricReportDefinition bool `json:"MetricReportDefinition"`
	OriginResource         bool `json:"OriginResource"`
	RegistryPrefix         bool `json:"RegistryPrefix"`
	ResourceType           bool `json:"ResourceType"`
	SubordinateResources   bool `json:"SubordinateResources"`
}

// EventDestination is EventDestination.v1_16_0.EventDestination: one subscription to events.
type EventDestination struct {
	Resource
	Destination              string     `json:"Destination,omitempty"`
	Protocol                 string     `json:"Protocol,omitempty"`         // Redfish
	SubscriptionType         string     `json:"SubscriptionType,omitempty"` // RedfishEvent, SSE
	EventFormatType          string     `json:"EventFormatType,omitempty"`  // Event
	Context                  *string    `json:"Context"`
	DeliveryRetryPolicy      string     `json:"DeliveryRetryPolicy,omitempty"`
	VerifyCertificate        *bool      `json:"VerifyCertificate,omitempty"`
	HTTPHeaders              []struct{} `json:"HttpHeaders"` // always empty: they hold secrets
	RegistryPrefixes         []string   `json:"RegistryPrefixes"`
	ExcludeRegistryPrefixes  []string   `json:"ExcludeRegistryPrefixes"`
	MessageIDs               []string   `json:"MessageIds"`
	ExcludeMessageIDs        []string   `json:"ExcludeMessageIds"`
	ResourceTypes            []string   `json:"ResourceTypes"`
	Severities               []Health   `json:"Severities"`
	OriginResources          []Link     `json:"OriginResources"`
	SubordinateResources     bool       `json:"SubordinateResources"`
	MetricReportDefinitions  []Link     `json:"MetricReportDefinitions,omitempty"`
	IncludeOriginOfCondition bool       `json:"IncludeOriginOfCondition"`
	SendHeartbeat            *bool      `json:"SendHeartbeat,omitempty"`
	HeartbeatIntervalMinutes int        `json:"HeartbeatIntervalMinutes,omitempty"`
	Status                   *Status    `json:"Status,omitempty"`
}

// Event is Event.v1_13_0.Event: what a subscriber gets. It is no resource and has no URI.
type Event struct {
	ODataType string        `json:"@odata.type"`
	ID        string        `json:"Id"`
	Name      string        `json:"Name"`
	Context   string        `json:"Context,omitempty"`
	Events    []EventRecord `json:"Events"`
}

// EventRecord is Event.v1_13_0.EventRecord.
type EventRecord struct {
	EventType         string   `json:"EventType"` // deprecated, and required
	EventID           string   `json:"EventId,omitempty"`
	EventGroupID      int64    `json:"EventGroupId,omitempty"`
	EventTimestamp    string   `json:"EventTimestamp,omitempty"`
	MemberID          string   `json:"MemberId"`
	MessageID         string   `json:"MessageId"`
	Message           string   `json:"Message,omitempty"`
	MessageArgs       []string `json:"MessageArgs,omitempty"`
	MessageSeverity   Health   `json:"MessageSeverity,omitempty"`
	Severity          string   `json:"Severity,omitempty"`
	Resolution        string   `json:"Resolution,omitempty"`
	OriginOfCondition any      `json:"OriginOfCondition,omitempty"` // *Link, or the resource where the subscriber asked for it
	LogEntry          *Link    `json:"LogEntry,omitempty"`
	OEM               OEM      `json:"Oem,omitempty"`
}
