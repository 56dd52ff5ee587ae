package service

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

const schemaOrigin = "http://redfish.dmtf.org/schemas/v1/"

// object is a JSON object of an OpenAPI document.
type object = map[string]any

// openapi writes the OpenAPI document (DSP0266, "OpenAPI") of the routes: each path with its methods, what they answer and what they take. It is JSON,
// of which every YAML parser makes the same.
func (s *Service) openapi() []byte {
	paths := object{}
	s.tree.walk(func(n *node) {
		path := n.pattern()
		if path == "/redfish/v1" {
			path += "/"
		}
		at := object{}
		for _, method := range n.methods() {
			if op := n.operation(method); op != nil {
				at[strings.ToLower(method)] = op
			}
		}
		if params := parameters(path); params != nil {
			at["parameters"] = params
		}
		paths[path] = at
		if n.route.Document != nil {
			return
		}
		for i := range n.route.Actions {
			a := &n.route.Actions[i]
			action := object{"post": object{
				"requestBody": content(properties(a.Parameters)), "responses": answers(object{"200": openAnswer(nil), "202": task(), "204": openAnswer(nil)}),
			}}
			if params := parameters(path); params != nil {
				action["parameters"] = params
			}
			paths[strings.TrimSuffix(path, "/")+a.target] = action
		}
	})
	b, err := json.Marshal(object{
		"openapi": "3.0.1", "info": object{"title": "Redfish service of " + s.o.Product, "version": redfishVersion}, "paths": paths,
		"components": object{"securitySchemes": object{
			"BasicAuth": object{"type": "http", "scheme": "basic"}, "XAuth": object{"type": "apiKey", "in": "header", "name": "X-Auth-Token"},
		}},
		"security": []object{{"BasicAuth": []string{}}, {"XAuth": []string{}}},
	})
	if err != nil {
		panic(err) // strings only
	}
	return b
}

// pattern returns a node's path with its parameters in braces.
func (n *node) pattern() string {
	if n.parent == nil {
		return "/"
	}
	return strings.TrimSuffix(n.parent.pattern(), "/") + "/" + n.segment
}

// operation describes a method of a resource; nil for HEAD, which is GET without its answer.
func (n *node) operation(method string) object {
	own := typeSchema(n.route.Type, n.route.schemaURI)
	switch method {
	case "GET":
		op := object{"responses": answers(object{"200": openAnswer(own)})}
		switch {
		case n.route.Document != nil:
			op["responses"] = answers(object{"200": object{"description": "The document", "content": object{"*/*": object{}}}})
			op["security"] = []object{}
		case n.route.Download != nil:
			op["responses"] = answers(object{"200": object{"description": "The file", "content": object{"application/octet-stream": object{}}}})
		case n.route.Stream != nil:
			op["responses"] = answers(object{"200": object{"description": "Events as they come", "content": object{"text/event-stream": object{}}}})
		case n.route.Handler != nil:
			op["responses"] = answers(object{"200": openAnswer(own), "202": task()})
		case n.route.Type == schema.TypeServiceRoot:
			op["security"] = []object{}
		}
		return op
	case "POST":
		if n.route.Upload != nil {
			return object{
				"requestBody": object{"required": true, "content": object{"multipart/form-data": object{}}},
				"responses":   answers(object{"202": task()}),
			}
		}
		op := object{"requestBody": content(properties(n.route.Create.Properties)), "responses": answers(object{"201": openAnswer(nil), "202": task()})}
		if n.route.Create.Open {
			op["security"] = []object{}
		}
		return op
	case "PATCH":
		return object{"requestBody": content(properties(n.route.Patch.Properties)), "responses": answers(object{"200": openAnswer(own)})}
	case "DELETE":
		return object{"responses": answers(object{"200": openAnswer(nil), "204": openAnswer(nil)})}
	}
	return nil
}

// parameters describes those of a path; nil if it has none.
func parameters(path string) []object {
	var out []object
	for _, part := range strings.Split(path, "/") {
		if strings.HasPrefix(part, "{") {
			out = append(out, object{"name": strings.Trim(part, "{}"), "in": "path", "required": true, "schema": object{"type": "string"}})
		}
	}
	return out
}

// answers adds the answer to everything that goes wrong.
func answers(by object) object {
	failure := object{"description": "What was wrong", "content": object{"application/json": object{"schema": object{"$ref": schemaOrigin + "redfish-error.v1_0_2.yaml#/components/schemas/redfish-error_v1_0_2_RedfishError"}}}}
	all := object{"default": failure}
	maps.Copy(all, by)
	return all
}

func openAnswer(schema object) object {
	if schema == nil {
		return object{"description": "It is done"}
	}
	return object{"description": "The resource", "content": object{"application/json": object{"schema": schema}}}
}

func task() object {
	return object{"description": "It takes longer: the task", "content": object{"application/json": object{"schema": typeSchema(schema.TypeTask, "")}}}
}

// typeSchema points to a type's schema: DMTF's, or ours.
func typeSchema(typ, own string) object {
	if own != "" || typ == "" {
		return object{"type": "object"}
	}
	parts := strings.Split(typ, ".")
	file, name := strings.Join(parts[:len(parts)-1], "."), strings.Join(parts, "_")
	return object{"$ref": schemaOrigin + file + ".yaml#/components/schemas/" + name}
}

func content(schema object) object {
	return object{"required": schema["required"] != nil, "content": object{"application/json": object{"schema": schema}}}
}

// properties describes the body of a request. Names may be paths.
func properties(all []Property) object {
	top := object{"type": "object"}
	for i := range all {
		at := top
		names := strings.Split(all[i].Name, "/")
		for {
			members, _ := at["properties"].(object)
			if members == nil {
				members = object{}
				at["properties"] = members
			}
			if required, _ := at["required"].([]string); all[i].Required && !slices.Contains(required, names[0]) {
				at["required"] = append(required, names[0])
			}
			if len(names) == 1 {
				members[names[0]] = all[i].describe()
				break
			}
			next, _ := members[names[0]].(object)
			if next == nil {
				next = object{"type": "object"}
				members[names[0]] = next
			}
			at, names = next, names[1:]
		}
	}
	return top
}

func (p *Property) describe() object {
	out := map[Kind]object{
		String: {"type": "string"}, Boolean: {"type": "boolean"}, Number: {"type": "integer"}, StringArray: {"type": "array", "items": object{"type": "string"}},
		Object: {"type": "object"}, ObjectArray: {"type": "array", "items": object{"type": "object"}},
	}[p.Kind]
	if out == nil {
		out = object{}
	}
	if p.Null {
		out["nullable"] = true
	}
	if p.Kind == String && len(p.Values) > 0 {
		out["enum"] = p.Values
	}
	return out
}
