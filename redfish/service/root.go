package service

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// redfishVersion is the version of the specification, DSP0266, that the service follows.
const redfishVersion = "1.23.0"

// standardRoutes are the resources that every service has.
func (s *Service) standardRoutes() []Route {
	openapi := sync.OnceValue(s.openapi) // not before all routes are there
	routes := []Route{
		{URI: "/", Document: func() (string, []byte) {
			index := s.o.Index
			if index == "" {
				index = "<!DOCTYPE html>\n<title>Redfish service</title>\n<p>This is a Redfish service: <a href=\"/redfish/v1/\">/redfish/v1/</a></p>\n"
			}
			return "text/html;charset=utf-8", []byte(index)
		}},
		{URI: "/redfish", Document: func() (string, []byte) {
			return "application/json;charset=utf-8", []byte(`{"v1":"/redfish/v1/"}`)
		}},
		{URI: "/redfish/v1/odata", Document: func() (string, []byte) { return "application/json;charset=utf-8", s.odata }},
		{URI: "/redfish/v1/$metadata", Document: func() (string, []byte) { return "application/xml;charset=utf-8", s.metadata }},
		{URI: "/redfish/v1/openapi.yaml", Document: func() (string, []byte) { return "application/yaml;charset=utf-8", openapi() }},
		{URI: "/redfish/v1", Type: schema.TypeServiceRoot, Get: s.root},
		{
			URI: "/redfish/v1/Registries", Type: schema.TypeRegistryFileCollection, Name: "Message Registries",
			Members: func(*Request) ([]string, error) {
				ids := append([]string{baseFile}, eventFiles...)
				for i := range s.o.Registries {
					ids = append(ids, s.o.Registries[i].id())
				}
				return ids, nil
			},
		},
		{URI: "/redfish/v1/Registries/{registry}", Type: schema.TypeRegistryFile, Get: s.registryFile},
		{
			URI: "/redfish/v1/JsonSchemas", Type: schema.TypeSchemaFileCollection, Name: "JSON Schemas",
			Members: func(*Request) (ids []string, err error) {
				for _, n := range s.schemas {
					if n.own == nil {
						ids = append(ids, n.file())
					}
				}
				for _, own := range s.o.Schemas {
					ids = slices.AppendSeq(ids, maps.Keys(own.JSON))
				}
				slices.Sort(ids)
				return ids, nil
			},
		},
		{
			URI: "/redfish/v1/JsonSchemas/{schema}", Type: schema.TypeSchemaFile,
			Get: func(r *Request) (schema.Object, error) {
				for _, n := range s.schemas {
					if id := n.file(); id == r.Param("schema") && n.own == nil {
						return &schema.JSONSchemaFile{
							Resource: schema.Resource{Name: id + " Schema File"}, Languages: []string{"en"}, Schema: "#" + id + "." + n.name,
							Location: []schema.Location{{Language: "en", PublicationURI: "http://redfish.dmtf.org/schemas/v1/" + id + ".json"}},
						}, nil
					}
				}
				for _, own := range s.o.Schemas {
					id := r.Param("schema")
					if own.JSON[id] == nil {
						continue
					}
					return &schema.JSONSchemaFile{
						Resource: schema.Resource{Name: id + " Schema File"}, Languages: []string{"en"}, Schema: "#" + id + "." + own.Namespace,
						Location: []schema.Location{{Language: "en", URI: schemaFilesURI + id + ".json"}},
					}, nil
				}
				return nil, ErrNotFound
			},
		},
	}
	for _, own := range s.o.Schemas {
		for id, text := range own.JSON {
			routes = append(routes, Route{URI: schemaFilesURI + id + ".json", Document: func() (string, []byte) { return "application/json;charset=utf-8", text() }})
		}
		routes = append(routes, Route{URI: own.uri(), Document: func() (string, []byte) { return "application/xml;charset=utf-8", own.CSDL() }})
	}
	for i := range s.o.Registries {
		own := &s.o.Registries[i]
		routes = append(routes, Route{URI: own.uri(), Document: func() (string, []byte) { return "application/json;charset=utf-8", own.json() }})
	}
	routes = append(routes, s.sessionRoutes()...)
	routes = append(routes, s.accountRoutes()...)
	routes = append(routes, s.roleRoutes()...)
	routes = append(routes, s.certificateRoutes()...)
	routes = append(routes, s.conditionRoutes()...)
	routes = append(routes, s.updateRoutes()...)
	routes = append(routes, s.eventRoutes()...)
	routes = append(routes, s.telemetryRoutes()...)
	return append(routes, s.taskRoutes()...)
}

// baseFile is DMTF's registry of general messages, which baseMessages is taken from.
const baseFile = "Base.1.22.1"

func (o *Registry) id() string  { return o.Prefix + "." + o.Version }
func (o *Registry) uri() string { return "/redfish/v1/registries/" + o.id() + ".json" }

// json writes the registry in the form of DSP8011.
func (o *Registry) json() []byte {
	b, err := json.Marshal(map[string]any{
		"@odata.type": "#MessageRegistry.v1_7_0.MessageRegistry", "Id": o.id(), "Name": o.Prefix + " Message Registry", "Language": "en",
		"Description": o.Description, "RegistryPrefix": o.Prefix, "RegistryVersion": o.Version, "OwningEntity": o.Owner, "Messages": o.Messages,
	})
	if err != nil {
		panic(err) // strings and numbers only
	}
	return b
}

func (s *Service) registryFile(r *Request) (schema.Object, error) {
	file := func(id string, where schema.Location) *schema.MessageRegistryFile {
		where.Language = "en"
		return &schema.MessageRegistryFile{
			Resource: schema.Resource{Name: id + " Message Registry File"}, Languages: []string{"en"},
			Registry: id[:strings.LastIndexByte(id, '.')], Location: []schema.Location{where},
		}
	}
	id := r.Param("registry")
	if id == baseFile || slices.Contains(eventFiles, id) {
		return file(id, schema.Location{PublicationURI: "https://redfish.dmtf.org/registries/" + id + ".json"}), nil
	}
	for i := range s.o.Registries {
		if own := &s.o.Registries[i]; own.id() == id {
			return file(id, schema.Location{URI: own.uri()}), nil
		}
	}
	return nil, ErrNotFound
}

// schemaFilesURI is where schemas of our own are served.
const schemaFilesURI = "/redfish/v1/schema/"

func (o *Schema) uri() string { return schemaFilesURI + o.Namespace + "_v1.xml" }

func (s *Service) root(r *Request) (schema.Object, error) {
	yes := schema.ProtocolFeaturesSupported{
		ExpandQuery: schema.ExpandQuery{ExpandAll: true, Levels: true, Links: true, NoLinks: true, MaxLevels: maxExpandLevels},
		FilterQuery: true, SelectQuery: true, ExcerptQuery: true, OnlyMemberQuery: true, TopSkipQuery: true, MultipleHTTPRequests: true,
	}
	out := &schema.ServiceRoot{
		Resource: schema.Resource{ID: "RootService", Name: "Root Service"}, RedfishVersion: redfishVersion, UUID: s.uuid,
		Product: s.o.Product, Vendor: s.o.Vendor, ProtocolFeaturesSupported: &yes,
		Links: schema.ServiceRootLinks{Sessions: schema.LinkTo(sessionsURI)},
	}
	for uri, link := range map[string]**schema.Link{
		"Systems": &out.Systems, "Managers": &out.Managers, "Chassis": &out.Chassis, "TaskService": &out.Tasks, "SessionService": &out.SessionService,
		"AccountService": &out.AccountService, "EventService": &out.EventService, "UpdateService": &out.UpdateService,
		"CertificateService": &out.CertificateService, "ComponentIntegrity": &out.ComponentIntegrity, "TelemetryService": &out.TelemetryService, "ServiceConditions": &out.ServiceConditions, "Registries": &out.Registries, "JsonSchemas": &out.JSONSchemas, "Managers/bmc": &out.Links.ManagerProvidingService,
	} {
		uri = "/redfish/v1/" + uri
		if n, _ := s.tree.find(uri); n != nil && n.route != nil {
			*link = schema.LinkTo(uri)
		}
	}
	if s.o.Root != nil {
		s.o.Root(out)
	}
	return out, nil
}

// conditionRoutes is the list of faults that are open now.
func (s *Service) conditionRoutes() []Route {
	if s.o.Conditions == nil {
		return nil
	}
	return []Route{{
		URI: "/redfish/v1/ServiceConditions", Type: schema.TypeServiceConditions,
		Get: func(r *Request) (schema.Object, error) {
			out := &schema.ServiceConditions{Resource: schema.Resource{Name: "Service Conditions"}, HealthRollup: schema.HealthOK, Conditions: []schema.Condition{}}
			for _, c := range s.o.Conditions(r) {
				out.Conditions = append(out.Conditions, c)
				if c.Severity == schema.HealthCritical || c.Severity == schema.HealthWarning && out.HealthRollup == schema.HealthOK {
					out.HealthRollup = c.Severity
				}
			}
			return out, nil
		},
	}}
}

// namespace is a schema that resources of the tree use.
type namespace struct {
	name    string // "ComputerSystem"
	version string // "v1_27_0"; "" for collections
	own     *Schema
}

// file returns the Id of the schema file: "ComputerSystem.v1_27_0".
func (n namespace) file() string {
	if n.version == "" {
		return n.name
	}
	return n.name + "." + n.version
}

// describedBy returns the URI of the JSON schema that describes the resource, or, for a schema of our own, of its CSDL.
func (r *Route) describedBy() string {
	if r.schemaURI != "" {
		return r.schemaURI
	}
	file, _, _ := strings.Cut(r.Type, ".")
	if parts := strings.Split(r.Type, "."); len(parts) == 3 {
		file = parts[0] + "." + parts[1]
	}
	return "http://redfish.dmtf.org/schemas/v1/" + file + ".json"
}

// finish works out, once all routes are there, what depends on the whole tree.
func (s *Service) finish() {
	s.frozen = true
	used := map[string]namespace{}
	var links []odataLink
	s.tree.walk(func(n *node) {
		if n.route.Document != nil {
			return
		}
		var ancestors []string
		for p := n.parent; p != nil; p = p.parent {
			if p.route != nil && p.route.Document == nil {
				ancestors = append(ancestors, p.route.entity())
			}
		}
		slices.Reverse(ancestors)
		n.privileges = privilegesOf(n.route.entity(), ancestors)
		parts := strings.Split(n.route.Type, ".")
		ns := namespace{name: parts[0]}
		if len(parts) == 3 {
			ns.version = parts[1]
		}
		for i := range s.o.Schemas {
			if own := &s.o.Schemas[i]; own.Namespace == ns.name {
				ns.own = own
				n.route.schemaURI = own.uri()
				if file := ns.file(); own.JSON[file] != nil {
					n.route.schemaURI = schemaFilesURI + file + ".json"
				}
			}
		}
		used[ns.file()] = ns
		if n.parent != nil && n.parent.segment == "v1" && n.route.Type != schema.TypeServiceRoot {
			links = append(links, odataLink{Name: n.segment, Kind: "Singleton", URL: "/redfish/v1/" + n.segment})
		}
	})
	// The targets of actions need what a POST to their resource does. The headers that are the same for all answers are made here.
	var actions func(*node)
	actions = func(n *node) {
		if n.route != nil || n.action != nil {
			n.allow = n.methods()
			n.allowed = []string{strings.Join(n.allow, ", ")}
		}
		if n.route != nil {
			n.route.link = []string{"<" + n.route.describedBy() + ">; rel=describedby"}
		}
		if n.action != nil {
			n.privileges = operations{"POST": n.owner.privileges["POST"]}
			if n.action.Privileges != nil {
				n.privileges["POST"] = n.action.Privileges
			}
		}
		for _, child := range n.children {
			actions(child)
		}
		if n.wild != nil {
			actions(n.wild)
		}
	}
	actions(&s.tree)

	for _, ns := range used {
		s.schemas = append(s.schemas, ns)
	}
	slices.SortFunc(s.schemas, func(a, b namespace) int { return cmp.Compare(a.file(), b.file()) })
	s.metadata = metadata(s.schemas, s.o.Schemas)
	links = append([]odataLink{{Name: "Service", Kind: "Singleton", URL: "/redfish/v1/"}, {Name: "Sessions", Kind: "Singleton", URL: sessionsURI}}, links...)
	odata, err := json.Marshal(map[string]any{"@odata.context": "/redfish/v1/$metadata", "value": links})
	if err != nil {
		panic(err) // strings only
	}
	s.odata = odata
}

// odataLink is one entry of the OData service document.
type odataLink struct {
	Name string `json:"name"`
	Kind string `json:"kind"`
	URL  string `json:"url"`
}

// metadata writes the OData metadata document: references to the schemas in use, and the service's entity container.
func metadata(used []namespace, own []Schema) []byte {
	var b bytes.Buffer
	b.WriteString(xml.Header)
	b.WriteString(`<edmx:Edmx xmlns:edmx="http://docs.oasis-open.org/odata/ns/edmx" Version="4.0">` + "\n")
	reference := func(uri string, namespaces ...string) {
		fmt.Fprintf(&b, "\t<edmx:Reference Uri=%q>\n", uri)
		for _, n := range namespaces {
			if n == "RedfishExtensions.v1_0_0" {
				fmt.Fprintf(&b, "\t\t<edmx:Include Namespace=%q Alias=\"Redfish\"/>\n", n)
				continue
			}
			fmt.Fprintf(&b, "\t\t<edmx:Include Namespace=%q/>\n", n)
		}
		b.WriteString("\t</edmx:Reference>\n")
	}
	const dmtf = "http://redfish.dmtf.org/schemas/v1/"
	rootVersion := ""
	for _, n := range used {
		if n.own != nil {
			continue
		}
		if n.name == "ServiceRoot" {
			rootVersion = n.version
		}
		if n.version == "" {
			reference(dmtf+n.name+"_v1.xml", n.name)
		} else {
			reference(dmtf+n.name+"_v1.xml", n.name, n.file())
		}
	}
	reference(dmtf+"Message_v1.xml", "Message", "Message.v1_3_0")
	reference(dmtf+"Resource_v1.xml", "Resource", "Resource.v1_0_0")
	reference(dmtf+"RedfishExtensions_v1.xml", "RedfishExtensions.v1_0_0")
	for _, o := range own {
		names := []string{o.Namespace}
		for _, v := range o.Versions {
			names = append(names, o.Namespace+"."+v)
		}
		reference(o.uri(), names...)
	}
	b.WriteString("\t<edmx:DataServices>\n\t\t<Schema xmlns=\"http://docs.oasis-open.org/odata/ns/edm\" Namespace=\"Service\">\n")
	fmt.Fprintf(&b, "\t\t\t<EntityContainer Name=\"Service\" Extends=\"ServiceRoot.%s.ServiceContainer\"/>\n", rootVersion)
	b.WriteString("\t\t</Schema>\n\t</edmx:DataServices>\n</edmx:Edmx>\n")
	return b.Bytes()
}

// loadUUID returns the service's UUID, which it makes at the first start.
func (s *Service) loadUUID() (string, error) {
	if s.o.StateDir != "" {
		b, err := os.ReadFile(s.path("uuid"))
		if err == nil && len(strings.TrimSpace(string(b))) == 36 {
			return strings.TrimSpace(string(b)), nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("read UUID: %w", err)
		}
	}
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40 // RFC 9562: version 4
	b[8] = b[8]&0x3f | 0x80
	uuid := fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	if s.o.StateDir != "" {
		if err := durable.WriteFile(s.path("uuid"), []byte(uuid+"\n"), 0o600); err != nil {
			return "", fmt.Errorf("store UUID: %w", err)
		}
	}
	return uuid, nil
}
