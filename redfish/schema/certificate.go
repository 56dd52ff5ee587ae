package schema

// CertificateService is CertificateService.v1_2_1.CertificateService.
type CertificateService struct {
	Resource
	CertificateLocations *Link `json:"CertificateLocations,omitempty"`
}

// CertificateLocations is CertificateLocations.v1_0_4.CertificateLocations.
type CertificateLocations struct {
	Resource
	Links CertificateLocationsLinks `json:"Links"`
}

// CertificateLocationsLinks are the certificates of a service.
type CertificateLocationsLinks struct {
	Certificates []Link `json:"Certificates"`
}

// Certificate is Certificate.v1_11_0.Certificate.
type Certificate struct {
	Resource
	CertificateString        string      `json:"CertificateString,omitempty"` // PEM, without keys
	CertificateType          string      `json:"CertificateType,omitempty"`   // PEM, PEMchain
	CertificateUsageTypes    []string    `json:"CertificateUsageTypes,omitempty"`
	Subject                  *Identifier `json:"Subject,omitempty"`
	Issuer                   *Identifier `json:"Issuer,omitempty"`
	ValidNotBefore           string      `json:"ValidNotBefore,omitempty"`
	ValidNotAfter            string      `json:"ValidNotAfter,omitempty"`
	SerialNumber             string      `json:"SerialNumber,omitempty"`
	Fingerprint              string      `json:"Fingerprint,omitempty"`
	FingerprintHashAlgorithm string      `json:"FingerprintHashAlgorithm,omitempty"` // TPM_ALG_SHA256
	SignatureAlgorithm       string      `json:"SignatureAlgorithm,omitempty"`       // of the TCG's registry or RFC 8017, RFC 5758
	KeyUsage                 []string    `json:"KeyUsage,omitempty"`
}

// Identifier is Certificate.v1_11_0.Identifier: the subject or issuer of a certificate.
type Identifier struct {
	CommonName         string   `json:"CommonName,omitempty"`
	Organization       string   `json:"Organization,omitempty"`
	OrganizationalUnit string   `json:"OrganizationalUnit,omitempty"`
	City               string   `json:"City,omitempty"`
	State              string   `json:"State,omitempty"`
	Country            string   `json:"Country,omitempty"`
	AlternativeNames   []string `json:"AlternativeNames,omitempty"`
}

// ManagerNetworkProtocol is ManagerNetworkProtocol.v1_12_0.ManagerNetworkProtocol.
type ManagerNetworkProtocol struct {
	Resource
	HostName *string        `json:"HostName"` // null if unknown
	FQDN     *string        `json:"FQDN"`
	HTTPS    *HTTPSProtocol `json:"HTTPS,omitempty"`
	SSDP     *SSDProtocol   `json:"SSDP,omitempty"`
	Status   *Status        `json:"Status,omitempty"`
}

// HTTPSProtocol is ManagerNetworkProtocol.v1_12_0.HTTPSProtocol.
type HTTPSProtocol struct {
	ProtocolEnabled bool  `json:"ProtocolEnabled"`
	Port            int   `json:"Port,omitempty"`
	Certificates    *Link `json:"Certificates,omitempty"`
}

// SSDProtocol is ManagerNetworkProtocol.v1_12_0.SSDProtocol.
type SSDProtocol struct {
	WriteableProperties []string `json:"@Redfish.WriteableProperties,omitempty"`
	ProtocolEnabled     bool     `json:"ProtocolEnabled"`
	Port                int      `json:"Port,omitempty"`
	NotifySeconds       int      `json:"NotifyMulticastIntervalSeconds"`
	NotifyTTL           int      `json:"NotifyTTL,omitempty"`
	NotifyIPv6Scope     string   `json:"NotifyIPv6Scope,omitempty"` // Link, Site, Organization
}

// ServiceConditions is ServiceConditions.v1_0_1.ServiceConditions.
type ServiceConditions struct {
	Resource
	HealthRollup Health      `json:"HealthRollup,omitempty"`
	Conditions   []Condition `json:"Conditions"`
}

// MultiFactorAuth is AccountService.v1_18_1.MultiFactorAuth.
type MultiFactorAuth struct {
	ClientCertificate *ClientCertificate `json:"ClientCertificate,omitempty"`
}

// ClientCertificate is AccountService.v1_18_1.ClientCertificate.
type ClientCertificate struct {
	Enabled                         bool   `json:"Enabled"`
	CertificateMappingAttribute     string `json:"CertificateMappingAttribute,omitempty"` // CommonName
	RespondToUnauthenticatedClients bool   `json:"RespondToUnauthenticatedClients"`
	Certificates                    *Link  `json:"Certificates,omitempty"`
}
