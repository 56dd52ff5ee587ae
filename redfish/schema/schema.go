// Package schema is DMTF's Redfish resources as plain Go structs, shared by server, client and tests.
//
// Each type cites the schema and version that it follows (release 2025.4 of DSP8010), and holds only the properties that
// the project uses: a property without a true value is left at its zero and is then absent from the JSON. The fields that
// every resource has, and its actions, are filled in by the service from the tree (see package redfish/service).
package schema

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"
)

// Resource is what all resources have in common (Resource.v1_20_0.Resource). Resource types embed it.
type Resource struct {
	ODataContext string  `json:"@odata.context,omitempty"`
	ODataID      string  `json:"@odata.id,omitempty"`
	ODataType    string  `json:"@odata.type,omitempty"`
	ODataETag    string  `json:"@odata.etag,omitempty"`
	ID           string  `json:"Id,omitempty"`
	Name         string  `json:"Name"`
	Description  string  `json:"Description,omitempty"`
	Actions      Actions `json:"Actions,omitzero"`
}

// Meta returns the common part, which is how the service reaches it in any resource.
func (r *Resource) Meta() *Resource { return r }

// Object is any resource: a pointer to a struct that embeds Resource.
type Object interface{ Meta() *Resource }

// Link is a reference to a resource (odata-v4.idRef).
type Link struct {
	ID string `json:"@odata.id"`
}

// LinkTo returns a reference to the resource at uri.
func LinkTo(uri string) *Link { return &Link{ID: uri} }

// Actions are the actions of a resource by their names, such as "#ComputerSystem.Reset".
type Actions map[string]Action

// Action is one action of a resource.
type Action struct {
	Target     string `json:"target"`
	Title      string `json:"title,omitempty"`
	ActionInfo string `json:"@Redfish.ActionInfo,omitempty"`
	// OEM says that the action is listed under Oem.
	OEM bool `json:"-"`
	// Allowable are the allowable values by parameter, written as "ResetType@Redfish.AllowableValues".
	Allowable map[string][]string `json:"-"`
}

const allowableValues = "@Redfish.AllowableValues"

// MarshalJSON adds the allowable values to the object.
func (a Action) MarshalJSON() ([]byte, error) { return a.append(nil), nil }

// append writes an action without reflection: services do that for each answer.
func (a Action) append(b []byte) []byte {
	b = append(b, `{"target":`...)
	b = appendString(b, a.Target)
	if a.Title != "" {
		b = appendString(append(b, `,"title":`...), a.Title)
	}
	if a.ActionInfo != "" {
		b = appendString(append(b, `,"@Redfish.ActionInfo":`...), a.ActionInfo)
	}
	for _, name := range sorted(a.Allowable) {
		b = appendString(append(b, ','), name+allowableValues)
		b = append(b, ':', '[')
		for i, v := range a.Allowable[name] {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(b, v)
		}
		b = append(b, ']')
	}
	return append(b, '}')
}

// sorted returns the keys of a map in order.
func sorted[V any](m map[string]V) []string {
	if len(m) < 2 {
		for k := range m {
			return []string{k}
		}
		return nil
	}
	return slices.Sorted(maps.Keys(m))
}

// appendString writes a JSON string.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			quoted, _ := json.Marshal(s) // a string always can be
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}

// UnmarshalJSON collects the allowable values.
func (a *Action) UnmarshalJSON(b []byte) error {
	type plain Action
	if err := json.Unmarshal(b, (*plain)(a)); err != nil {
		return err
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	for k, v := range m {
		name, ok := strings.CutSuffix(k, allowableValues)
		if !ok {
			continue
		}
		var values []string
		if json.Unmarshal(v, &values) != nil {
			continue // other kinds of values are of no use to anybody here
		}
		if a.Allowable == nil {
			a.Allowable = map[string][]string{}
		}
		a.Allowable[name] = values
	}
	return nil
}

// MarshalJSON puts the actions of others than DMTF under Oem.
func (a Actions) MarshalJSON() ([]byte, error) {
	b := make([]byte, 0, 512)
	names := sorted(a)
	begin := byte('{')
	write := func(oem bool) {
		for _, name := range names {
			if action := a[name]; action.OEM == oem {
				b = appendString(append(b, begin), name)
				b = action.append(append(b, ':'))
				begin = ','
			}
		}
	}
	write(false)
	if slices.ContainsFunc(names, func(name string) bool { return a[name].OEM }) {
		b = append(b, begin)
		b = append(b, `"Oem":`...)
		begin = '{'
		write(true)
		return append(b, '}', '}'), nil
	}
	if begin == '{' {
		b = append(b, '{')
	}
	return append(b, '}'), nil
}

// UnmarshalJSON flattens the actions under Oem into the map.
func (a *Actions) UnmarshalJSON(b []byte) error {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	*a = Actions{}
	for name, raw := range m {
		if name == "Oem" {
			var oem map[string]json.RawMessage
			if json.Unmarshal(raw, &oem) != nil {
				continue
			}
			for name, raw := range oem {
				a.add(name, raw, true)
			}
			continue
		}
		a.add(name, raw, false)
	}
	return nil
}

// add takes in one member of an Actions object; what is not an action (another vendor's nesting) is left out.
func (a Actions) add(name string, raw json.RawMessage, oem bool) {
	var action Action
	if !strings.HasPrefix(name, "#") || json.Unmarshal(raw, &action) != nil {
		return
	}
	action.OEM = oem
	a[name] = action
}

// State is Resource.State.
type State string

// States that the project uses.
const (
	StateEnabled            State = "Enabled"
	StateDisabled           State = "Disabled"
	StateStandbyOffline     State = "StandbyOffline"
	StateStarting           State = "Starting"
	StateUnavailableOffline State = "UnavailableOffline"
	StateInTest             State = "InTest"
	StateAbsent             State = "Absent"
	StateUpdating           State = "Updating"
	StateQuiesced           State = "Quiesced"
)

// Health is Resource.Health. The zero value, which is absent from JSON, means that it could not be told.
type Health string

// The values of Health.
const (
	HealthOK       Health = "OK"
	HealthWarning  Health = "Warning"
	HealthCritical Health = "Critical"
)

// Status is Resource.Status.
type Status struct {
	State        State       `json:"State,omitempty"`
	Health       Health      `json:"Health,omitempty"`
	HealthRollup Health      `json:"HealthRollup,omitempty"`
	Conditions   []Condition `json:"Conditions,omitempty"`
}

// Condition is Resource.Condition: a reason for a state or health that is not fine.
type Condition struct {
	MessageID         string   `json:"MessageId"`
	MessageArgs       []string `json:"MessageArgs,omitempty"`
	Message           string   `json:"Message,omitempty"`
	Severity          Health   `json:"Severity,omitempty"`
	Timestamp         string   `json:"Timestamp,omitempty"`
	OriginOfCondition *Link    `json:"OriginOfCondition,omitempty"`
	LogEntry          *Link    `json:"LogEntry,omitempty"`
}

// PowerState is Resource.PowerState. The zero value, which is absent from JSON, means that it could not be told.
type PowerState string

// The values of PowerState.
const (
	PowerOn          PowerState = "On"
	PowerOff         PowerState = "Off"
	PowerPoweringOn  PowerState = "PoweringOn"
	PowerPoweringOff PowerState = "PoweringOff"
	PowerPaused      PowerState = "Paused"
)

// ResetType is Resource.ResetType.
type ResetType string

// The values of ResetType that the project uses.
const (
	ResetOn               ResetType = "On"
	ResetForceOn          ResetType = "ForceOn"
	ResetForceOff         ResetType = "ForceOff"
	ResetGracefulShutdown ResetType = "GracefulShutdown"
	ResetGracefulRestart  ResetType = "GracefulRestart"
	ResetForceRestart     ResetType = "ForceRestart"
	ResetNMI              ResetType = "Nmi"
	ResetPushPowerButton  ResetType = "PushPowerButton"
	ResetPowerCycle       ResetType = "PowerCycle"
	ResetPause            ResetType = "Pause"
	ResetResume           ResetType = "Resume"
	ResetSuspend          ResetType = "Suspend"
)

// OEM holds the objects of others than DMTF by their identifiers, undecoded.
type OEM map[string]json.RawMessage

// Time renders t as Redfish wants it: RFC 3339 with a time zone, to the second; empty for the zero time.
func Time(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// Collection is any resource collection, such as ComputerSystemCollection. Members are references, or the whole resources
// where the schema expands them (LogEntryCollection) or the client has asked for it.
type Collection struct {
	Resource
	Count    int               `json:"Members@odata.count"`
	Members  []json.RawMessage `json:"Members"`
	NextLink string            `json:"Members@odata.nextLink,omitempty"`
}

// Message is Message.v1_3_0.Message: one message of a registry, with its arguments filled in.
type Message struct {
	ODataType         string   `json:"@odata.type,omitempty"`
	MessageID         string   `json:"MessageId"`
	Message           string   `json:"Message,omitempty"`
	MessageArgs       []string `json:"MessageArgs,omitempty"`
	MessageSeverity   Health   `json:"MessageSeverity,omitempty"`
	Resolution        string   `json:"Resolution,omitempty"`
	RelatedProperties []string `json:"RelatedProperties,omitempty"`
}

// Error is the body of an error response (redfish-error.v1_0_2).
type Error struct {
	Error ErrorBody `json:"error"`
}

// ErrorBody is what an error response says.
type ErrorBody struct {
	Code         string    `json:"code"`
	Message      string    `json:"message"`
	ExtendedInfo []Message `json:"@Message.ExtendedInfo"`
}
