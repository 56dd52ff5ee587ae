package oem

import (
	"cmp"
	"encoding/json"
	"reflect"
	"strings"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// ownFiles is where services serve our schemas, and where each refers to the others.
const ownFiles = "/redfish/v1/schema/"

const dmtf = "http://redfish.dmtf.org/schemas/v1/"

type object = map[string]any

// JSON returns the schema in the form of DSP8010's JSON schemas: that of the version and, for a resource, the one without a
// version that refers to it; unversioned is nil for a schema of objects.
func (s Schema) JSON() (versioned, unversioned []byte) {
	g := jsonGenerator{defs: object{}, done: map[reflect.Type]bool{}}
	title := s.Name
	for _, name := range sortedKeys(s.Objects) {
		g.object(name, s.Purpose, reflect.TypeOf(s.Objects[name]), false)
		title = name
	}
	if s.Resource != nil {
		g.object(s.Name, s.Purpose, reflect.TypeOf(s.Resource), true)
		title = s.Name
	}
	for len(g.queue) > 0 {
		t := g.queue[0]
		g.queue = g.queue[1:]
		g.object(typeName(t), "The "+words(t.Name())+" as the agent's package "+pkg(t)+" has it.", t, false)
	}
	for _, a := range s.Actions {
		g.action(a)
		if s.Resource == nil && len(s.Objects) == 0 {
			title = a.Name
		}
	}
	file := s.Name + "." + s.Version
	versioned = write(object{
		"$id": ownFiles + file + ".json", "$schema": dmtf + "redfish-schema-v1.json", "$ref": "#/definitions/" + title,
		"title": "#" + s.Type(title), "definitions": g.defs, "owningEntity": "Backdoor", "release": "1.0", "language": "en",
	})
	if s.Resource == nil {
		return versioned, nil
	}
	return versioned, write(object{
		"$id": ownFiles + s.Name + ".json", "$schema": dmtf + "redfish-schema-v1.json", "$ref": "#/definitions/" + s.Name,
		"title": "#" + s.Name + "." + s.Name, "owningEntity": "Backdoor", "language": "en",
		"definitions": object{s.Name: object{
			"anyOf": []object{
				{"$ref": dmtf + "odata-v4.json#/definitions/idRef"},
				{"$ref": ownFiles + file + ".json#/definitions/" + s.Name},
			},
			"description": s.Purpose, "longDescription": s.Purpose, "uris": s.URIs, "insertable": false, "updatable": false, "deletable": s.Deletable,
		}},
	})
}

func write(v object) []byte {
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		panic(err) // strings only
	}
	return append(b, '\n')
}

type jsonGenerator struct {
	defs  object
	done  map[reflect.Type]bool
	queue []reflect.Type
}

// object writes the definition of a struct.
func (g *jsonGenerator) object(name, description string, t reflect.Type, resource bool) {
	properties := object{}
	def := object{"type": "object", "additionalProperties": false, "description": description, "longDescription": description, "properties": properties}
	if resource {
		for _, part := range []string{"context", "etag", "id", "type"} {
			properties["@odata."+part] = object{"$ref": dmtf + "odata-v4.json#/definitions/" + part}
		}
		properties["Id"] = object{"$ref": dmtf + "Resource.json#/definitions/Id", "readonly": true}
		properties["Name"] = object{"$ref": dmtf + "Resource.json#/definitions/Name", "readonly": true}
		properties["Description"] = object{"anyOf": []object{{"$ref": dmtf + "Resource.json#/definitions/Description"}, {"type": "null"}}, "readonly": true}
		def["required"] = []string{"@odata.id", "@odata.type", "Id", "Name"}
	} else {
		properties["@odata.type"] = object{"$ref": dmtf + "odata-v4.json#/definitions/type"}
	}
	def["patternProperties"] = object{`^([a-zA-Z_][a-zA-Z0-9_]*)?@(odata|Redfish|Message)\.[a-zA-Z_][a-zA-Z0-9_]*$`: object{
		"description": "This property shall specify a valid odata or Redfish property.",
		"type":        []string{"array", "boolean", "integer", "number", "null", "object", "string"},
	}}
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
		text := words(f.name) + "."
		text = strings.ToUpper(text[:1]) + text[1:]
		of := f.typ
		for of.Kind() == reflect.Pointer {
			of = of.Elem()
		}
		if of == durationType {
			text = words(f.name) + ", in nanoseconds."
		}
		p := g.of(f.typ)
		p["description"], p["longDescription"], p["readonly"] = cmp.Or(f.doc, text), cmp.Or(f.doc, text), true
		properties[f.name] = p
	}
	g.defs[name] = def
}

// of returns the schema of a Go type.
func (g *jsonGenerator) of(t reflect.Type) object {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t.Implements(holderType):
		return g.of(reflect.Zero(t).Interface().(holder).held())
	case t == linkType:
		return object{"$ref": dmtf + "odata-v4.json#/definitions/idRef"}
	case t == timeType:
		return object{"type": "string", "format": "date-time"}
	case t == durationType:
		return object{"type": "integer"}
	case opaque(t):
		return object{"type": "string"}
	}
	switch t.Kind() {
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Float32, reflect.Float64:
		return object{"type": "number"}
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string"} // base64
		}
		return object{"type": "array", "items": g.of(t.Elem())}
	case reflect.Struct:
		if !g.done[t] {
			g.done[t] = true
			g.queue = append(g.queue, t)
		}
		return object{"$ref": "#/definitions/" + typeName(t)}
	}
	return object{"type": "integer"} // edm has refused what is left
}

// action writes the definition of an action, and of its parameters.
func (g *jsonGenerator) action(a Action) {
	parameters := object{}
	for _, p := range a.Parameters {
		types := map[string]string{"Edm.String": "string", "Edm.Boolean": "boolean", "Edm.Int64": "integer"}
		parameters[p.Name] = object{"type": types[p.Type], "description": p.Description, "longDescription": p.Description, "requiredParameter": p.Required}
	}
	g.defs[a.Name] = object{
		"type": "object", "additionalProperties": false, "description": a.Description, "longDescription": a.Description, "parameters": parameters,
		"properties": object{
			"target": object{"type": "string", "format": "uri-reference", "description": "Link to invoke action"},
			"title":  object{"type": "string", "description": "Friendly action name"},
		},
	}
}
