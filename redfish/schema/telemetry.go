package schema

// Types of the resources of telemetry.
const (
	TypeTelemetryService       = "TelemetryService.v1_4_1.TelemetryService"
	TypeMetricDefinition       = "MetricDefinition.v1_3_5.MetricDefinition"
	TypeMetricReportDefinition = "MetricReportDefinition.v1_4_7.MetricReportDefinition"
	TypeMetricReport           = "MetricReport.v1_5_2.MetricReport"
	TypeTriggers               = "Triggers.v1_4_0.Triggers"

	TypeMetricDefinitionCollection       = "MetricDefinitionCollection.MetricDefinitionCollection"
	TypeMetricReportDefinitionCollection = "MetricReportDefinitionCollection.MetricReportDefinitionCollection"
	TypeMetricReportCollection           = "MetricReportCollection.MetricReportCollection"
	TypeTriggersCollection               = "TriggersCollection.TriggersCollection"
)

// TelemetryService is TelemetryService.v1_4_1.TelemetryService.
type TelemetryService struct {
	Resource
	ServiceEnabled          bool    `json:"ServiceEnabled"`
	MaxReports              int     `json:"MaxReports,omitempty"`
	MinCollectionInterval   string  `json:"MinCollectionInterval,omitempty"` // ISO 8601 duration
	Status                  *Status `json:"Status,omitempty"`
	MetricDefinitions       *Link   `json:"MetricDefinitions,omitempty"`
	MetricReportDefinitions *Link   `json:"MetricReportDefinitions,omitempty"`
	MetricReports           *Link   `json:"MetricReports,omitempty"`
	Triggers                *Link   `json:"Triggers,omitempty"`
}

// MetricDefinition is MetricDefinition.v1_3_5.MetricDefinition.
type MetricDefinition struct {
	Resource
	MetricType       string   `json:"MetricType,omitempty"`     // Gauge, Counter
	MetricDataType   string   `json:"MetricDataType,omitempty"` // Integer, Decimal
	Units            string   `json:"Units,omitempty"`          // UCUM
	Implementation   string   `json:"Implementation,omitempty"` // PhysicalSensor, Calculated, Synthesized
	IsLinear         bool     `json:"IsLinear"`
	MetricProperties []string `json:"MetricProperties,omitempty"` // URIs with JSON pointers
}

// MetricReportDefinition is MetricReportDefinition.v1_4_7.MetricReportDefinition.
type MetricReportDefinition struct {
	Resource
	Type             string           `json:"MetricReportDefinitionType,omitempty"` // Periodic, OnRequest
	Enabled          bool             `json:"MetricReportDefinitionEnabled"`
	ReportActions    []string         `json:"ReportActions"` // LogToMetricReportsCollection, RedfishEvent
	ReportUpdates    string           `json:"ReportUpdates,omitempty"`
	Schedule         *Schedule        `json:"Schedule,omitempty"`
	Metrics          []ReportedMetric `json:"Metrics,omitempty"`
	MetricProperties []string         `json:"MetricProperties,omitempty"`
	MetricReport     *Link            `json:"MetricReport,omitempty"`
	Status           *Status          `json:"Status,omitempty"`
}

// Schedule is Schedule.v1_2_5.Schedule.
type Schedule struct {
	RecurrenceInterval string `json:"RecurrenceInterval,omitempty"` // ISO 8601 duration
}

// ReportedMetric is MetricReportDefinition.v1_4_7.Metric.
type ReportedMetric struct {
	MetricID         string   `json:"MetricId,omitempty"`
	MetricProperties []string `json:"MetricProperties,omitempty"`
}

// MetricReport is MetricReport.v1_5_2.MetricReport.
type MetricReport struct {
	Resource
	Context                string        `json:"Context,omitempty"`
	Timestamp              string        `json:"Timestamp,omitempty"`
	MetricReportDefinition *Link         `json:"MetricReportDefinition,omitempty"`
	MetricValues           []MetricValue `json:"MetricValues"`
}

// MetricValue is MetricReport.v1_5_2.MetricValue.
type MetricValue struct {
	MetricID       string `json:"MetricId,omitempty"`
	MetricValue    string `json:"MetricValue"`
	MetricProperty string `json:"MetricProperty,omitempty"`
	Timestamp      string `json:"Timestamp,omitempty"`
}

// Triggers is Triggers.v1_4_0.Triggers.
type Triggers struct {
	Resource
	MetricType        string        `json:"MetricType,omitempty"` // Numeric
	MetricIDs         []string      `json:"MetricIds,omitempty"`
	MetricProperties  []string      `json:"MetricProperties,omitempty"`
	NumericThresholds *Thresholds   `json:"NumericThresholds,omitempty"`
	TriggerActions    []string      `json:"TriggerActions"` // RedfishEvent, RedfishMetricReport
	TriggerEnabled    bool          `json:"TriggerEnabled"`
	Status            *Status       `json:"Status,omitempty"`
	Links             *TriggerLinks `json:"Links,omitempty"`
}

// Thresholds is Triggers.v1_4_0.Thresholds.
type Thresholds struct {
	UpperCritical *Threshold `json:"UpperCritical,omitempty"`
	UpperWarning  *Threshold `json:"UpperWarning,omitempty"`
	LowerWarning  *Threshold `json:"LowerWarning,omitempty"`
	LowerCritical *Threshold `json:"LowerCritical,omitempty"`
}

// Threshold is Triggers.v1_4_0.Threshold.
type Threshold struct {
	Reading    float64 `json:"Reading"`
	Activation string  `json:"Activation,omitempty"` // Increasing, Decreasing
}

// TriggerLinks are the related resources of triggers.
type TriggerLinks struct {
	MetricReportDefinitions []Link `json:"MetricReportDefinitions,omitempty"`
}
