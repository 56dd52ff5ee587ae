// Package strictjson decodes configuration so that no slip of the pen goes unnoticed.
//
// Unknown fields, fields given twice, names in another case, wrong types and trailing text are errors, and each says
// its line, column and path: "config.json:7:5: memory.devcie: unknown field, did you mean device?". Comments are not
// part of JSON and are refused like any other stray text.
package strictjson

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
)

// Error is what is wrong with a document, and where.
type Error struct {
	Name         string // of the document
	Line, Column int    // from 1; the column counts bytes
	Path         string // of the value, as in memory.layout[1]; empty at the top
	Err          error

	offset int64
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s:%d:%d: ", e.Name, e.Line, e.Column)
	if e.Path != "" {
		s += e.Path + ": "
	}
	return s + e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// maxDepth bounds the nesting of a document.
const maxDepth = 64

// Unmarshal decodes the one JSON value in data into v, a non-nil pointer. The name stands for the document in errors,
// all of which are *Error. Structures are decoded field by field by their json tags; a type with its own UnmarshalJSON
// or UnmarshalText is left to it, as are maps.
func Unmarshal(name string, data []byte, v any) error {
	d := decoder{name: name, data: data}
	if err := d.syntax(); err != nil {
		return err
	}
	d.dec = json.NewDecoder(bytes.NewReader(data))
	if err := d.value(reflect.ValueOf(v).Elem(), "", 0); err != nil {
		return err
	}
	return nil
}

type decoder struct {
	name string
	data []byte
	dec  *json.Decoder
}

func (d *decoder) errorAt(offset int64, path string, err error) error {
	offset = max(0, min(offset, int64(len(d.data))))
	before := d.data[:offset]
	return &Error{
		Name: d.name, Path: path, Err: err, offset: offset,
		Line:   1 + bytes.Count(before, []byte("\n")),
		Column: len(before) - bytes.LastIndexByte(before, '\n'),
	}
}

// syntax checks the whole document first, so that the walk below only meets valid JSON.
func (d *decoder) syntax() error {
	if len(bytes.TrimSpace(d.data)) == 0 {
		return d.errorAt(0, "", errors.New("the document is empty"))
	}
	var raw json.RawMessage
	err := json.Unmarshal(d.data, &raw)
	if err == nil {
		return nil
	}
	var se *json.SyntaxError
	if errors.As(err, &se) {
		return d.errorAt(se.Offset-1, "", err)
	}
	return d.errorAt(0, "", err)
}

// next returns the offset at which the next token starts.
func (d *decoder) next() int64 {
	o := d.dec.InputOffset()
	for o < int64(len(d.data)) && strings.IndexByte(" \t\r\n,:", d.data[o]) >= 0 {
		o++
	}
	return o
}

// value decodes the next value of the document into v.
func (d *decoder) value(v reflect.Value, path string, depth int) error {
	start := d.next()
	if depth > maxDepth {
		return d.errorAt(start, path, fmt.Errorf("nested more than %d deep", maxDepth))
	}
	if v.Kind() == reflect.Pointer && !v.Type().Implements(unmarshaler) {
		if d.data[start] == 'n' {
			return d.leaf(v, path, start)
		}
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	own := v.Addr().Type().Implements(unmarshaler) || v.Addr().Type().Implements(textUnmarshaler)
	switch {
	case own:
	case v.Kind() == reflect.Struct && d.data[start] == '{':
		return d.object(v, path, depth)
	case v.Kind() == reflect.Slice && v.Type().Elem().Kind() != reflect.Uint8 && d.data[start] == '[':
		return d.array(v, path, depth)
	}
	return d.leaf(v, path, start)
}

var (
	unmarshaler     = reflect.TypeFor[json.Unmarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

func (d *decoder) leaf(v reflect.Value, path string, start int64) error {
	var raw json.RawMessage
	if err := d.dec.Decode(&raw); err != nil {
		return d.errorAt(start, path, err)
	}
	if string(raw) == "null" {
		return d.errorAt(start, path, errors.New("null is not a value here; leave the field out"))
	}
	err := json.Unmarshal(raw, v.Addr().Interface())
	var te *json.UnmarshalTypeError
	if errors.As(err, &te) {
		err = fmt.Errorf("want %s, found %s", describe(te.Type), te.Value)
	}
	var inner *Error // of an UnmarshalJSON that uses this package
	if errors.As(err, &inner) {
		return d.errorAt(start+inner.offset, path+inner.Path, inner.Err)
	}
	if err != nil {
		return d.errorAt(start, path, err)
	}
	return nil
}

func describe(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a string"
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "a whole number that is not negative"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return "a whole number"
	case reflect.Float32, reflect.Float64:
		return "a number"
	}
	return t.String()
}

func (d *decoder) array(v reflect.Value, path string, depth int) error {
	if _, err := d.dec.Token(); err != nil {
		return d.errorAt(d.next(), path, err)
	}
	v.Set(reflect.MakeSlice(v.Type(), 0, 0))
	for i := 0; d.dec.More(); i++ {
		e := reflect.New(v.Type().Elem()).Elem()
		if err := d.value(e, fmt.Sprintf("%s[%d]", path, i), depth+1); err != nil {
			return err
		}
		v.Set(reflect.Append(v, e))
	}
	_, err := d.dec.Token()
	if err != nil {
		return d.errorAt(d.next(), path, err)
	}
	return nil
}

func (d *decoder) object(v reflect.Value, path string, depth int) error {
	if _, err := d.dec.Token(); err != nil {
		return d.errorAt(d.next(), path, err)
	}
	fields, names := fieldsOf(v.Type())
	seen := make(map[string]bool)
	for d.dec.More() {
		start := d.next()
		tok, err := d.dec.Token()
		if err != nil {
			return d.errorAt(start, path, err)
		}
		key, _ := tok.(string)
		at := key
		if path != "" {
			at = path + "." + key
		}
		i, ok := fields[key]
		switch {
		case !ok:
			err := fmt.Errorf("unknown field; known here: %s", strings.Join(names, ", "))
			if near := closest(key, names); near != "" {
				err = fmt.Errorf("unknown field, did you mean %s?", near)
			}
			return d.errorAt(start, at, err)
		case seen[key]:
			return d.errorAt(start, at, errors.New("given twice"))
		}
		seen[key] = true
		f, err := v.FieldByIndexErr(i)
		if err != nil {
			return d.errorAt(start, at, err)
		}
		if err := d.value(f, at, depth+1); err != nil {
			return err
		}
	}
	if _, err := d.dec.Token(); err != nil {
		return d.errorAt(d.next(), path, err)
	}
	return nil
}

// fieldsOf maps the JSON names of a structure's fields to their indices, and lists the names in order.
func fieldsOf(t reflect.Type) (map[string][]int, []string) {
	m := make(map[string][]int)
	var names []string
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" || !f.IsExported() || f.Anonymous && name == "" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		m[name] = f.Index
		names = append(names, name)
	}
	return m, names
}

// closest returns the name that the key was probably meant to be, or "".
func closest(key string, names []string) string {
	best, at := "", 3
	for _, n := range names {
		if d := distance(strings.ToLower(key), strings.ToLower(n)); d < at && d < len(n) {
			best, at = n, d
		}
	}
	return best
}

// distance is the edit distance of two short strings; of long ones it is just large.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diag, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diag+cost)
		}
	}
	return row[len(b)]
}
