// Package oem describes our own additions to Redfish: it writes Go values as OEM objects, and generates the CSDL that
// describes them from the very types that are served, so that the two cannot drift apart.
//
// A property is named as its JSON member, with the first letter in upper case: "hostUUID" is served as "HostUUID". Decoders
// of encoding/json therefore read an OEM object into the same Go type. What has no value (null, the empty string, the zero time) is absent.
// Durations are nanoseconds. A struct's tag `doc:"…"` describes a member in the CSDL; else its name has to do.
package oem

import (
	"bytes"
	"cmp"
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Identifier is the name of our objects under Oem: a domain name with underscores for dots (DSP0266, "OEM-specified object naming").
const Identifier = "dev_backdoor"

var (
	timeType     = reflect.TypeFor[time.Time]()
	durationType = reflect.TypeFor[time.Duration]()
	textType     = reflect.TypeFor[encoding.TextMarshaler]()
	linkType     = reflect.TypeFor[schema.Link]()
)

// Encode writes a value in the form of an OEM object's member.
func Encode(v any) (json.RawMessage, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode OEM object: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber() // addresses have 64 bits
	var plain any
	if err := dec.Decode(&plain); err != nil {
		return nil, fmt.Errorf("encode OEM object: %w", err)
	}
	b, err = json.Marshal(rename(reflect.TypeOf(v), plain))
	if err != nil {
		return nil, fmt.Errorf("encode OEM object: %w", err)
	}
	return b, nil
}

// Object returns an Oem member with one object of ours, of the type "BackdoorLogEntry.v1_0_0.LogEntry". v is a struct.
func Object(typ string, v any) (schema.OEM, error) {
	b, err := Encode(v)
	if err != nil {
		return nil, err
	}
	head := []byte(`{"@odata.type":"#` + typ + `"`)
	if len(b) > 2 {
		head = append(head, ',')
	}
	return schema.OEM{Identifier: append(head, b[1:]...)}, nil
}

// Value is a member of a resource of ours that is a Go value, which is served as Encode writes it.
type Value[T any] struct{ V T }

// MarshalJSON implements json.Marshaler.
func (v Value[T]) MarshalJSON() ([]byte, error) { return Encode(v.V) }

// UnmarshalJSON implements json.Unmarshaler.
func (v *Value[T]) UnmarshalJSON(b []byte) error { return json.Unmarshal(b, &v.V) }

func (Value[T]) held() reflect.Type { return reflect.TypeFor[T]() }

// holder is a Value of any type.
type holder interface{ held() reflect.Type }

var holderType = reflect.TypeFor[holder]()

// rename gives the members of structs their names as properties, and leaves out what has no value.
func rename(t reflect.Type, v any) any {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil || opaque(t) {
		return v
	}
	switch v := v.(type) {
	case map[string]any:
		if t.Kind() != reflect.Struct {
			return v
		}
		out := make(map[string]any, len(v))
		for _, f := range fields(t) {
			item, ok := v[f.json]
			if !ok || item == nil || item == "" || f.typ == timeType && item == "0001-01-01T00:00:00Z" {
				continue
			}
			out[f.name] = rename(f.typ, item)
		}
		return out
	case []any:
		if t.Kind() == reflect.Slice || t.Kind() == reflect.Array {
			for i, item := range v {
				v[i] = rename(t.Elem(), item)
			}
		}
	}
	return v
}

// opaque reports whether a type writes its JSON by itself.
func opaque(t reflect.Type) bool {
	return t == timeType || t == linkType || t.Implements(textType) || reflect.PointerTo(t).Implements(textType)
}

// member is a member of a struct as JSON has it.
type member struct {
	json string // "hostUUID"
	name string // "HostUUID"
	doc  string // the struct's tag "doc", if it has one
	typ  reflect.Type
}

// fields lists the members of a struct, those of embedded structs among them.
func fields(t reflect.Type) []member {
	var out []member
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" || !f.IsExported() && !f.Anonymous {
			continue
		}
		if f.Anonymous && name == "" {
			inner := f.Type
			if inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			if inner.Kind() == reflect.Struct {
				out = append(out, fields(inner)...)
				continue
			}
		}
		if name == "" {
			name = f.Name
		}
		out = append(out, member{json: name, name: property(name), doc: f.Tag.Get("doc"), typ: f.Type})
	}
	return out
}

// property returns the name of the property for a JSON member.
func property(name string) string {
	if name == "" || strings.HasPrefix(name, "@") {
		return name
	}
	return strings.ToUpper(name[:1]) + name[1:]
}

// Schema is one namespace of ours.
type Schema struct {
	Name    string // "BackdoorState"
	Version string // "v1_0_0"
	Purpose string // one sentence
	// Resource is a resource of our own: a struct that embeds schema.Resource. Its entity type has the name of the schema.
	Resource any
	URIs     []string
	// Deletable says that clients may delete the resource.
	Deletable bool
	// Objects stand under Oem in DMTF's resources: structs by the name of their complex type.
	Objects map[string]any
	// Actions of DMTF's resources.
	Actions []Action
}

// Action is an action of ours on a resource of DMTF's.
type Action struct {
	Name, Description string // "Heal"
	// Bound is the OemActions type of the resource, of the version that defines it: "ComputerSystem.v1_0_0.OemActions".
	Bound      string
	Parameters []Parameter
}

// Parameter is a parameter of an action.
type Parameter struct {
	Name, Type, Description string // Type is "Edm.String" or "Edm.Boolean"
	Required                bool
}

// Type returns the type of an object or of the resource, as @odata.type has it without its "#".
func (s Schema) Type(name string) string { return s.Name + "." + s.Version + "." + name }

// CSDL returns the schema as OData's Common Schema Definition Language (OASIS, CSDL XML 4.0) in the form that DSP0266 asks for.
func (s Schema) CSDL() []byte {
	g := generator{done: map[reflect.Type]bool{}}
	g.line(0, `<?xml version="1.0" encoding="UTF-8"?>`)
	g.line(0, `<edmx:Edmx xmlns:edmx="http://docs.oasis-open.org/odata/ns/edmx" Version="4.0">`)
	g.reference("http://docs.oasis-open.org/odata/odata/v4.0/errata03/csd01/complete/vocabularies/Org.OData.Core.V1.xml", `<edmx:Include Namespace="Org.OData.Core.V1" Alias="OData"/>`)
	g.reference("http://docs.oasis-open.org/odata/odata/v4.0/errata03/csd01/complete/vocabularies/Org.OData.Capabilities.V1.xml", `<edmx:Include Namespace="Org.OData.Capabilities.V1" Alias="Capabilities"/>`)
	g.reference("http://redfish.dmtf.org/schemas/v1/RedfishExtensions_v1.xml", `<edmx:Include Namespace="RedfishExtensions.v1_0_0" Alias="Redfish"/>`)
	g.reference("http://redfish.dmtf.org/schemas/v1/Resource_v1.xml", `<edmx:Include Namespace="Resource"/>`, `<edmx:Include Namespace="Resource.v1_0_0"/>`)
	var bound []string
	for _, a := range s.Actions {
		namespace := a.Bound[:strings.LastIndexByte(a.Bound, '.')]
		if !slices.Contains(bound, namespace) {
			bound = append(bound, namespace)
			base, _, _ := strings.Cut(namespace, ".")
			g.reference("http://redfish.dmtf.org/schemas/v1/"+base+"_v1.xml", fmt.Sprintf(`<edmx:Include Namespace=%q/>`, base), fmt.Sprintf(`<edmx:Include Namespace=%q/>`, namespace))
		}
	}
	g.line(1, `<edmx:DataServices>`)

	g.line(2, `<Schema xmlns="http://docs.oasis-open.org/odata/ns/edm" Namespace=%q>`, s.Name)
	g.line(3, `<Annotation Term="Redfish.OwningEntity" String="Backdoor"/>`)
	if s.Resource != nil {
		g.line(3, `<EntityType Name=%q BaseType="Resource.v1_0_0.Resource" Abstract="true">`, s.Name)
		g.describe(4, s.Purpose)
		for _, c := range [][2]string{{"Insert", "Insertable"}, {"Update", "Updatable"}, {"Delete", "Deletable"}} {
			g.line(4, `<Annotation Term="Capabilities.%sRestrictions">`, c[0])
			g.line(5, `<Record><PropertyValue Property=%q Bool="%t"/></Record>`, c[1], c[1] == "Deletable" && s.Deletable)
			g.line(4, `</Annotation>`)
		}
		g.line(4, `<Annotation Term="Redfish.Uris"><Collection>`)
		for _, uri := range s.URIs {
			g.line(5, `<String>%s</String>`, uri)
		}
		g.line(4, `</Collection></Annotation>`)
		g.line(3, `</EntityType>`)
	}
	for _, a := range s.Actions {
		g.line(3, `<Action Name=%q IsBound="true">`, a.Name)
		g.describe(4, a.Description)
		g.line(4, `<Parameter Name=%q Type=%q/>`, strings.Split(a.Bound, ".")[0], a.Bound)
		for _, p := range a.Parameters {
			nullable := ""
			if p.Required {
				nullable = ` Nullable="false"`
			}
			g.line(4, `<Parameter Name=%q Type=%q%s>`, p.Name, p.Type, nullable)
			g.describe(5, p.Description)
			g.line(4, `</Parameter>`)
		}
		g.line(3, `</Action>`)
	}
	g.line(2, `</Schema>`)

	g.namespace = s.Name + "." + s.Version
	g.line(2, `<Schema xmlns="http://docs.oasis-open.org/odata/ns/edm" Namespace=%q>`, g.namespace)
	g.line(3, `<Annotation Term="Redfish.OwningEntity" String="Backdoor"/>`)
	g.line(3, `<Annotation Term="Redfish.Release" String="1.0"/>`)
	if s.Resource != nil {
		g.line(3, `<EntityType Name=%q BaseType="%s.%s">`, s.Name, s.Name, s.Name)
		g.describe(4, s.Purpose)
		g.properties(reflect.TypeOf(s.Resource), true)
		g.line(3, `</EntityType>`)
	}
	for _, name := range sortedKeys(s.Objects) {
		g.line(3, `<ComplexType Name=%q BaseType="Resource.OemObject">`, name)
		g.describe(4, s.Purpose)
		g.properties(reflect.TypeOf(s.Objects[name]), false)
		g.line(3, `</ComplexType>`)
	}
	for len(g.queue) > 0 {
		t := g.queue[0]
		if _, taken := s.Objects[typeName(t)]; taken {
			panic("schema " + s.Name + ": the object and the Go type " + typeName(t) + " have the same name")
		}
		g.queue = g.queue[1:]
		g.line(3, `<ComplexType Name=%q>`, typeName(t))
		g.line(4, `<Annotation Term="OData.AdditionalProperties" Bool="false"/>`)
		g.describe(4, "The "+words(t.Name())+" as the agent's package "+pkg(t)+" has it.")
		g.properties(t, false)
		g.line(3, `</ComplexType>`)
	}
	g.line(2, `</Schema>`)
	g.line(1, `</edmx:DataServices>`)
	g.line(0, `</edmx:Edmx>`)
	return g.out.Bytes()
}

// generator writes CSDL.
type generator struct {
	out       bytes.Buffer
	namespace string
	done      map[reflect.Type]bool
	queue     []reflect.Type
}

func (g *generator) line(depth int, format string, args ...any) {
	g.out.WriteString(strings.Repeat("\t", depth))
	fmt.Fprintf(&g.out, format, args...)
	g.out.WriteByte('\n')
}

func (g *generator) reference(uri string, includes ...string) {
	g.line(1, `<edmx:Reference Uri=%q>`, uri)
	for _, i := range includes {
		g.line(2, "%s", i)
	}
	g.line(1, `</edmx:Reference>`)
}

func (g *generator) describe(depth int, text string) {
	g.line(depth, `<Annotation Term="OData.Description" String=%q/>`, text)
	g.line(depth, `<Annotation Term="OData.LongDescription" String=%q/>`, text)
}

// properties writes the properties of a struct. Those of schema.Resource come with the base type.
func (g *generator) properties(t reflect.Type, resource bool) {
	common := map[string]bool{}
	if resource {
		for _, f := range fields(reflect.TypeFor[schema.Resource]()) {
			common[f.name] = true
		}
	}
	for _, f := range fields(t) {
		if common[f.name] || strings.HasPrefix(f.name, "@") {
			continue
		}
		of := f.typ
		for of.Kind() == reflect.Pointer {
			of = of.Elem()
		}
		if of == linkType {
			g.line(4, `<NavigationProperty Name=%q Type="Resource.Resource" Nullable="false">`, f.name)
			g.line(5, `<Annotation Term="OData.Permissions" EnumMember="OData.Permission/Read"/>`)
			g.describe(5, cmp.Or(f.doc, "The link to "+words(f.name)+"."))
			g.line(4, `</NavigationProperty>`)
			continue
		}
		g.line(4, `<Property Name=%q Type=%q Nullable="false">`, f.name, g.edm(f.typ))
		g.line(5, `<Annotation Term="OData.Permissions" EnumMember="OData.Permission/Read"/>`)
		text := words(f.name) + "."
		if of == durationType {
			text = words(f.name) + ", in nanoseconds."
		}
		g.describe(5, cmp.Or(f.doc, strings.ToUpper(text[:1])+text[1:]))
		g.line(4, `</Property>`)
	}
}

// edm returns the OData type of a Go type.
func (g *generator) edm(t reflect.Type) string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t.Implements(holderType):
		return g.edm(reflect.Zero(t).Interface().(holder).held())
	case t == timeType:
		return "Edm.DateTimeOffset"
	case t == durationType:
		return "Edm.Int64"
	case opaque(t):
		return "Edm.String"
	}
	switch t.Kind() {
	case reflect.Bool:
		return "Edm.Boolean"
	case reflect.String:
		return "Edm.String"
	case reflect.Float32, reflect.Float64:
		return "Edm.Double"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64, reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "Edm.Int64"
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return "Edm.String" // base64
		}
		return "Collection(" + g.edm(t.Elem()) + ")"
	case reflect.Struct:
		if !g.done[t] {
			g.done[t] = true
			g.queue = append(g.queue, t)
		}
		return g.namespace + "." + typeName(t)
	}
	panic(fmt.Sprintf("%s cannot be described in CSDL: give it a type of its own", t))
}

func pkg(t reflect.Type) string { return t.PkgPath()[strings.LastIndexByte(t.PkgPath(), '/')+1:] }

// typeName tells types of different packages apart.
func typeName(t reflect.Type) string { return property(pkg(t)) + property(t.Name()) }

// words splits a name for people: "LastRun" is "last run", "TimerIRQs" is "timer IRQs".
func words(name string) string {
	lower := func(i int) bool { return i >= 0 && i < len(name) && 'a' <= name[i] && name[i] <= 'z' }
	plural := func(i int) bool { return i < len(name) && name[i] == 's' && !lower(i+1) }
	var out strings.Builder
	for i := range len(name) {
		c := name[i]
		if 'A' <= c && c <= 'Z' {
			begins := lower(i+1) && !plural(i+1) // of a word that is no abbreviation
			if i > 0 && (lower(i-1) || begins) {
				out.WriteByte(' ')
			}
			if begins {
				c += 'a' - 'A'
			}
		}
		out.WriteByte(c)
	}
	return out.String()
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
