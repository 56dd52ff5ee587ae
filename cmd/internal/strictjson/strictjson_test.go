package strictjson

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

type doc struct {
	Name   string          `json:"name"`
	Count  int             `json:"count,omitempty"`
	Ports  []uint16        `json:"ports"`
	Inner  *inner          `json:"inner,omitempty"`
	List   []inner         `json:"list"`
	Addr   netip.Addr      `json:"addr"`
	Since  time.Time       `json:"since"`
	Raw    json.RawMessage `json:"raw"`
	Hidden string          `json:"-"`
}

type inner struct {
	Device string            `json:"device"`
	On     bool              `json:"on"`
	Labels map[string]string `json:"labels"`
}

func TestUnmarshal(t *testing.T) {
	var got doc
	err := Unmarshal("doc", []byte(`
{
	"name": "a\"b", "count": 3, "ports": [1, 2],
	"inner": {"device": "x", "on": true, "labels": {"k": "v"}},
	"list": [{"device": "y"}, {}],
	"addr": "10.0.0.1",
	"since": "2026-01-02T03:04:05Z",
	"raw": {"any": [1]}
}`), &got)
	if err != nil {
		t.Fatal(err)
	}
	want := doc{
		Name: `a"b`, Count: 3, Ports: []uint16{1, 2},
		Inner: &inner{Device: "x", On: true, Labels: map[string]string{"k": "v"}},
		List:  []inner{{Device: "y"}, {}},
		Addr:  netip.MustParseAddr("10.0.0.1"),
		Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Raw:   json.RawMessage(`{"any": [1]}`),
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("Unmarshal: -want +got\n%s", d)
	}
}

func TestUnmarshalErrors(t *testing.T) {
	for _, tt := range []struct{ name, data, want string }{
		{"empty", " \n", `doc:1:1: the document is empty`},
		{"syntax", "{\n  \"name\": \"a\",\n}", `doc:3:1: invalid character '}' looking for beginning of object key string`},
		{"cut short", `{"name": "a"`, `doc:1:12: unexpected end of JSON input`},
		{"trailing", `{} {}`, `doc:1:4: invalid character '{' after top-level value`},
		{"comment", "{\n// no\n}", `doc:2:1: invalid character '/' looking for beginning of object key string`},
		{"unknown", "{\n  \"name\": \"a\",\n  \"xyzzy\": 1\n}", `doc:3:3: xyzzy: unknown field; known here: name, count, ports, inner, list, addr, since, raw`},
		{"misspelt", `{"nmae": "a"}`, `doc:1:2: nmae: unknown field, did you mean name?`},
		{"case", `{"Name": "a"}`, `doc:1:2: Name: unknown field, did you mean name?`},
		{"hidden", `{"Hidden": "a"}`, `doc:1:2: Hidden: unknown field; known here: name, count, ports, inner, list, addr, since, raw`},
		{"nested", `{"list": [{}, {"devcie": "x"}]}`, `doc:1:16: list[1].devcie: unknown field, did you mean device?`},
		{"nested pointer", `{"inner": {"device": "x", "of": 1}}`, `doc:1:27: inner.of: unknown field, did you mean on?`},
		{"twice", `{"name": "a", "count": 1, "name": "b"}`, `doc:1:27: name: given twice`},
		{"type", `{"name": 1}`, `doc:1:10: name: want a string, found number`},
		{"object for list", `{"ports": {}}`, `doc:1:11: ports: want a list, found object`},
		{"list for object", `{"inner": []}`, `doc:1:11: inner: want an object, found array`},
		{"list for all", `[]`, `doc:1:1: want an object, found array`},
		{"range", `{"ports": [1, 70000]}`, `doc:1:15: ports[1]: want a whole number that is not negative, found number 70000`},
		{"fraction", `{"count": 1.5}`, `doc:1:11: count: want a whole number, found number 1.5`},
		{"null", `{"name": null}`, `doc:1:10: name: null is not a value here; leave the field out`},
		{"null pointer", `{"inner": null}`, `doc:1:11: inner: null is not a value here; leave the field out`},
		{"text", `{"addr": "10.0.0.300"}`, `doc:1:10: addr: ParseAddr("10.0.0.300"): IPv4 field has value >255`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got doc
			err := Unmarshal("doc", []byte(tt.data), &got)
			if err == nil || err.Error() != tt.want {
				t.Errorf("Unmarshal(%s) = %v\nwant %s", tt.data, err, tt.want)
			}
			var e *Error
			if !errors.As(err, &e) {
				t.Errorf("Unmarshal(%s): %T is not *Error", tt.data, err)
			}
		})
	}
}

func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`{"name":"a","list":[{"device":"x","labels":{"a":"b"}}],"inner":{"on":true}}`))
	f.Add([]byte(`{"name":`))
	f.Add([]byte(strings.Repeat(`{"inner":`, 100)))
	f.Fuzz(func(t *testing.T, data []byte) {
		var strict, loose doc
		if err := Unmarshal("doc", data, &strict); err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Line < 1 || e.Column < 1 {
				t.Fatalf("Unmarshal(%q): %v is not an *Error with a place", data, err)
			}
			return
		}
		// What the strict decoder takes, the standard one must understand alike.
		if err := json.Unmarshal(data, &loose); err != nil {
			t.Fatalf("Unmarshal(%q) took what encoding/json refuses: %v", data, err)
		}
		a, _ := json.Marshal(strict)
		b, _ := json.Marshal(loose)
		if string(a) != string(b) {
			t.Fatalf("Unmarshal(%q) = %s; encoding/json says %s", data, a, b)
		}
	})
}
