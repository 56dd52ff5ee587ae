package schema

import "encoding/json"

// UpdateService is UpdateService.v1_17_0.UpdateService.
type UpdateService struct {
	Resource
	ServiceEnabled       bool   `json:"ServiceEnabled"`
	MultipartHTTPPushURI string `json:"MultipartHttpPushUri,omitempty"`
	// ApplyTimeSupport says when what is pushed can be applied.
	ApplyTimeSupport  *ApplyTimeSupport `json:"MultipartHttpPushUri@Redfish.OperationApplyTimeSupport,omitempty"`
	MaxImageSizeBytes int64             `json:"MaxImageSizeBytes,omitempty"`
	FirmwareInventory *Link             `json:"FirmwareInventory,omitempty"`
	Status            *Status           `json:"Status,omitempty"`
	OEM               OEM               `json:"Oem,omitempty"`
}

// ApplyTimeSupport is Settings.v1_4_0.OperationApplyTimeSupport.
type ApplyTimeSupport struct {
	ODataType       string   `json:"@odata.type"`
	SupportedValues []string `json:"SupportedValues"`
}

// SoftwareInventory is SoftwareInventory.v1_13_0.SoftwareInventory: one image that is installed.
type SoftwareInventory struct {
	Resource
	Version                string  `json:"Version"`                          // null where nothing is installed
	LowestSupportedVersion string  `json:"LowestSupportedVersion,omitempty"` // older ones are refused
	SoftwareID             string  `json:"SoftwareId,omitempty"`
	Manufacturer           string  `json:"Manufacturer,omitempty"`
	ReleaseDate            string  `json:"ReleaseDate,omitempty"`
	SizeBytes              int64   `json:"SizeBytes,omitempty"`
	ResetRequired          *bool   `json:"ResetRequiredOnUpdate,omitempty"`
	Updateable             bool    `json:"Updateable"`
	Active                 *bool   `json:"Active,omitempty"` // it is what runs, or what is activated
	Staged                 *bool   `json:"Staged,omitempty"`
	RelatedItem            []Link  `json:"RelatedItem,omitempty"`
	Status                 *Status `json:"Status,omitempty"`
}

// MarshalJSON writes the version of nothing as null.
func (s *SoftwareInventory) MarshalJSON() ([]byte, error) {
	type plain SoftwareInventory
	out := struct {
		*plain
		Version *string `json:"Version"`
	}{plain: (*plain)(s)}
	if s.Version != "" {
		out.Version = &s.Version
	}
	return json.Marshal(out)
}
