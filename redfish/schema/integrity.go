package schema

// ComponentIntegrity is ComponentIntegrity.v1_3_2.ComponentIntegrity.
type ComponentIntegrity struct {
	Resource
	Type               string              `json:"ComponentIntegrityType"`        // TPM
	TypeVersion        string              `json:"ComponentIntegrityTypeVersion"` // 2.0
	Enabled            bool                `json:"ComponentIntegrityEnabled"`
	TargetComponentURI string              `json:"TargetComponentURI"`
	LastUpdated        string              `json:"LastUpdated,omitempty"`
	Status             *Status             `json:"Status,omitempty"`
	TPM                *IntegrityTPM       `json:"TPM,omitempty"`
	Links              *IntegrityProtected `json:"Links,omitempty"`
}

// IntegrityTPM is ComponentIntegrity.v1_3_2.TPMinfo.
type IntegrityTPM struct {
	NonceSizeBytesMaximum  int               `json:"NonceSizeBytesMaximum,omitempty"`
	IdentityAuthentication *IntegrityKey     `json:"IdentityAuthentication,omitempty"`
	MeasurementSet         *IntegrityPCRList `json:"MeasurementSet,omitempty"`
}

// IntegrityKey is ComponentIntegrity.v1_3_2.TPMauth.
type IntegrityKey struct {
	ComponentCertificate *Link `json:"ComponentCertificate,omitempty"`
}

// IntegrityPCRList is ComponentIntegrity.v1_3_2.TPMmeasurementSet.
type IntegrityPCRList struct {
	Measurements []IntegrityPCR `json:"Measurements"`
}

// IntegrityPCR is ComponentIntegrity.v1_3_2.TPMsingleMeasurement.
type IntegrityPCR struct {
	PCR         int    `json:"PCR"`
	Measurement string `json:"Measurement"`              // base64
	Algorithm   string `json:"MeasurementHashAlgorithm"` // TPM_ALG_SHA256
}

// IntegrityProtected is ComponentIntegrity.v1_3_2.Links.
type IntegrityProtected struct {
	ComponentsProtected []Link `json:"ComponentsProtected"`
}

// SignedMeasurements is ComponentIntegrity.v1_2_0.TPMGetSignedMeasurementsResponse.
type SignedMeasurements struct {
	SignedMeasurements string `json:"SignedMeasurements"` // base64 of TPM2B_ATTEST and TPMT_SIGNATURE
}

// TrustedComponent is TrustedComponent.v1_4_0.TrustedComponent.
type TrustedComponent struct {
	Resource
	Type            string        `json:"TrustedComponentType"` // Discrete, Integrated
	Manufacturer    string        `json:"Manufacturer,omitempty"`
	FirmwareVersion string        `json:"FirmwareVersion,omitempty"`
	Certificates    *Link         `json:"Certificates,omitempty"`
	TPM             *TrustedTPM   `json:"TPM,omitempty"`
	Status          *Status       `json:"Status,omitempty"`
	Links           *TrustedLinks `json:"Links,omitempty"`
	OEM             OEM           `json:"Oem,omitempty"`
}

// TrustedTPM is TrustedComponent.v1_1_0.TPM.
type TrustedTPM struct {
	CapabilitiesVendorID string `json:"CapabilitiesVendorID,omitempty"`
}

// TrustedLinks is TrustedComponent.v1_4_0.Links.
type TrustedLinks struct {
	ComponentIntegrity  []Link `json:"ComponentIntegrity,omitempty"`
	ComponentsProtected []Link `json:"ComponentsProtected,omitempty"`
}

// EventLog is TrustedComponent.v1_3_0.TPMGetEventLogResponse.
type EventLog struct {
	EventLog string `json:"EventLog"` // base64
}
