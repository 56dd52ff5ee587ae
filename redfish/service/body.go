package service

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// field is one member of a request body, in the order sent.
type field struct {
	name  string // a path from the top, with '/' between names
	value any    // string, bool, json.Number, nil, []any, or map[string]any for an object that is a property of its own
}

// parseBody decodes a JSON object into fields. Objects are opened up, except those whose path whole names. The depth is bounded
// before anything is built, and a name that occurs twice is refused.
func parseBody(b []byte, depth int, whole func(path string) bool) ([]field, *Error) {
	if !utf8.Valid(b) {
		return nil, refuse(400, "MalformedJSON")
	}
	if jsonDepth(b) > depth {
		e := refuse(400, "MalformedJSON")
		e.Messages[0].Message = fmt.Sprintf("The request body is nested deeper than the %d levels that the service takes.", depth)
		return nil, e
	}
	if !json.Valid(b) {
		return nil, refuse(400, "MalformedJSON")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	t, err := dec.Token()
	if err != nil {
		return nil, refuse(400, "MalformedJSON")
	}
	if t != json.Delim('{') {
		return nil, refuse(400, "UnrecognizedRequestBody")
	}
	var fields []field
	if e := parseObject(dec, "", whole, &fields); e != nil {
		return nil, e
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, refuse(400, "MalformedJSON")
	}
	return fields, nil
}

// parseObject reads the rest of an object whose brace was read.
func parseObject(dec *json.Decoder, prefix string, whole func(string) bool, fields *[]field) *Error {
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return refuse(400, "MalformedJSON")
		}
		name, ok := t.(string)
		if !ok {
			return refuse(400, "MalformedJSON")
		}
		if seen[name] {
			return refuse(400, "PropertyDuplicate", name).about(prefix + name)
		}
		seen[name] = true
		path := prefix + name
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return refuse(400, "MalformedJSON")
		}
		if raw[0] == '{' && !whole(path) && !strings.HasPrefix(name, "@") {
			inner := json.NewDecoder(bytes.NewReader(raw))
			inner.UseNumber()
			if _, err := inner.Token(); err != nil {
				return refuse(400, "MalformedJSON")
			}
			before := len(*fields)
			if e := parseObject(inner, path+"/", whole, fields); e != nil {
				return e
			}
			if len(*fields) == before {
				*fields = append(*fields, field{path, map[string]any{}})
			}
			continue
		}
		var v any
		one := json.NewDecoder(bytes.NewReader(raw))
		one.UseNumber()
		if err := one.Decode(&v); err != nil {
			return refuse(400, "MalformedJSON")
		}
		*fields = append(*fields, field{path, v})
	}
	if _, err := dec.Token(); err != nil {
		return refuse(400, "MalformedJSON")
	}
	return nil
}

// jsonDepth returns how deep brackets are nested, without decoding.
func jsonDepth(b []byte) int {
	depth, deepest := 0, 0
	inString := false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			depth++
			deepest = max(deepest, depth)
		case c == '}' || c == ']':
			depth--
		}
	}
	return deepest
}

// annotation reports whether a field is one of OData's or Redfish's own, which a service ignores in requests.
func annotation(path string) bool {
	return slices.ContainsFunc(strings.Split(path, "/"), func(s string) bool {
		return strings.HasPrefix(s, "@") || strings.Contains(s, "@odata.") || strings.Contains(s, "@Redfish.") || strings.Contains(s, "@Message.")
	})
}

// checker makes the right messages for a body: those of an action's parameters differ from those of properties.
type checker struct {
	action string // "" for properties
	r      *Request
}

func (c checker) unknown(name string) *Error {
	if c.action != "" {
		return refuse(400, "ActionParameterUnknown", c.action, name).about(name)
	}
	return refuse(400, "PropertyUnknown", name).about(name)
}

func (c checker) bad(kind, value, name string) *Error {
	if c.action != "" {
		return refuse(400, "ActionParameterValue"+kind, value, name, c.action).about(name)
	}
	return refuse(400, "PropertyValue"+kind, value, name).about(name)
}

// check returns a field's value in the Go type of its kind.
func (c checker) check(p *Property, f field) (any, *Error) {
	shown := show(f.value)
	if p.Name == "Password" || p.Name == "HttpHeaders" {
		shown = "******"
	}
	if f.value == nil {
		if p.Null {
			return nil, nil
		}
		return nil, c.bad("TypeError", "null", f.name)
	}
	switch p.Kind {
	case String:
		s, ok := f.value.(string)
		if !ok {
			return nil, c.bad("TypeError", shown, f.name)
		}
		if values := p.allowed(c.r); values != nil && !slices.Contains(values, s) {
			return nil, c.bad("NotInList", shown, f.name)
		}
		if p.Max > 0 && int64(len(s)) > p.Max {
			return nil, refuse(400, "StringValueTooLong", shown, fmt.Sprint(p.Max)).about(f.name)
		}
		if int64(len(s)) < p.Min {
			return nil, refuse(400, "StringValueTooShort", shown, fmt.Sprint(p.Min)).about(f.name)
		}
		return s, nil
	case Boolean:
		b, ok := f.value.(bool)
		if !ok {
			return nil, c.bad("TypeError", shown, f.name)
		}
		return b, nil
	case Number:
		n, ok := f.value.(json.Number)
		if !ok {
			return nil, c.bad("TypeError", shown, f.name)
		}
		i, err := n.Int64()
		if err != nil {
			x, err := n.Float64()
			if err != nil || x != math.Trunc(x) || math.Abs(x) > 1<<53 {
				return nil, c.bad("TypeError", shown, f.name)
			}
			i = int64(x)
		}
		if (p.Min != 0 || p.Max != 0) && (i < p.Min || i > p.Max) {
			return nil, c.bad("OutOfRange", shown, f.name)
		}
		return i, nil
	case StringArray:
		list, ok := f.value.([]any)
		if !ok {
			return nil, c.bad("TypeError", shown, f.name)
		}
		values := p.allowed(c.r)
		out := make([]string, len(list))
		for i, v := range list {
			s, ok := v.(string)
			if !ok {
				return nil, c.bad("TypeError", show(v), f.name)
			}
			if values != nil && !slices.Contains(values, s) {
				return nil, c.bad("NotInList", show(v), f.name)
			}
			out[i] = s
		}
		return out, nil
	case ObjectArray:
		list, ok := f.value.([]any)
		if !ok {
			return nil, c.bad("TypeError", shown, f.name)
		}
		out := make([]map[string]any, len(list))
		for i, v := range list {
			if out[i], ok = v.(map[string]any); !ok {
				return nil, c.bad("TypeError", show(v), f.name)
			}
		}
		return out, nil
	case Object:
		m, ok := f.value.(map[string]any)
		if !ok {
			return nil, c.bad("TypeError", shown, f.name)
		}
		return m, nil
	}
	panic("property " + p.Name + " has no kind")
}

// show renders a value for a message.
func show(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case nil:
		return "null"
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "?"
	}
	return string(b)
}

// wholeObjects tells parseBody which objects are values.
func wholeObjects(properties []Property) func(string) bool {
	return func(path string) bool {
		return slices.ContainsFunc(properties, func(p Property) bool { return p.Kind == Object && p.Name == path })
	}
}

func property(properties []Property, name string) *Property {
	for i := range properties {
		if properties[i].Name == name {
			return &properties[i]
		}
	}
	return nil
}

// strict checks the body of a POST: everything must be known, of the right kind, and complete.
func strict(c checker, properties []Property, body []byte, depth int) (Values, *Error) {
	values := Values{}
	if len(bytes.TrimSpace(body)) == 0 && c.action != "" {
		body = []byte("{}") // many clients send no body with an action that needs none
	}
	fields, e := parseBody(body, depth, wholeObjects(properties))
	if e != nil {
		return nil, e
	}
	var all *Error
	for _, f := range fields {
		if annotation(f.name) {
			continue
		}
		p := property(properties, f.name)
		if p == nil {
			if c.action == "" && f.name == "Oem" || strings.HasPrefix(f.name, "Oem/") || strings.HasPrefix(f.name, "Links/Oem") {
				continue // other vendors' additions are nobody's business here
			}
			all = all.join(c.unknown(f.name))
			continue
		}
		v, e := c.check(p, f)
		if e != nil {
			all = all.join(e)
			continue
		}
		values[f.name] = v
	}
	for _, p := range properties {
		if !p.Required || values.Has(p.Name) || all.mentions(p.Name) {
			continue
		}
		if c.action != "" {
			all = all.join(refuse(400, "ActionParameterMissing", c.action, p.Name).about(p.Name))
		} else {
			all = all.join(refuse(400, "CreateFailedMissingReqProperties", p.Name).about(p.Name))
		}
	}
	if all != nil {
		return nil, all
	}
	return values, nil
}

// join collects refusals into one.
func (e *Error) join(other *Error) *Error {
	if e == nil {
		return other
	}
	const enough = 20
	if len(e.Messages) < enough {
		e.Messages = append(e.Messages, other.Messages...)
	}
	return e
}

func (e *Error) mentions(property string) bool {
	return e != nil && slices.ContainsFunc(e.Messages, func(m schema.Message) bool {
		return slices.Contains(m.RelatedProperties, "#/"+property)
	})
}
