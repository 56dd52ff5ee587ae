package schema

import (
	"encoding/json"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestActions(t *testing.T) {
	want := Actions{
		"#ComputerSystem.Reset": {Target: "/t", ActionInfo: "/i", Allowable: map[string][]string{"ResetType": {"On", "ForceOff"}}},
		"#Vendor.Heal":          {Target: "/o", Title: "Heal", OEM: true},
	}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	const text = `{"#ComputerSystem.Reset":{"target":"/t","@Redfish.ActionInfo":"/i","ResetType@Redfish.AllowableValues":["On","ForceOff"]},"Oem":{"#Vendor.Heal":{"target":"/o","title":"Heal"}}}`
	if string(b) != text {
		t.Errorf("Marshal = %s; want %s", b, text)
	}
	var got Actions
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("Unmarshal (-want +got):\n%s", d)
	}
}

func TestStrangeActions(t *testing.T) {
	for in, want := range map[string]int{
		`{}`: 0,
		`{"Oem":{"Vendor":{"#Vendor.X":{"target":"/x"}}}}`:                0, // nested as the specification does not allow
		`{"#A.B":7,"#A.C":{"target":"/c"}}`:                               1,
		`{"Oem":[],"#A.C":{"target":"/c","X@Redfish.AllowableValues":7}}`: 1,
	} {
		var got Actions
		if err := json.Unmarshal([]byte(in), &got); err != nil || len(got) != want {
			t.Errorf("Unmarshal(%s) = %v, %v; want %d actions", in, got, err, want)
		}
	}
}

func TestTime(t *testing.T) {
	if got := Time(time.Time{}); got != "" {
		t.Errorf("Time(zero) = %q; want none", got)
	}
	if got, want := Time(time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))), "2026-01-02T02:04:05Z"; got != want {
		t.Errorf("Time = %q; want %q", got, want)
	}
}

func TestAbsentIsAbsent(t *testing.T) {
	b, err := json.Marshal(&ComputerSystem{Resource: Resource{Name: "x"}})
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != `{"Name":"x"}` {
		t.Errorf("an unknown system is %s", b)
	}
}

func FuzzResources(f *testing.F) {
	f.Add([]byte(`{"@odata.id":"/x","Name":"n","Actions":{"#A.B":{"target":"/t"}},"Status":{"Health":"OK"},"Oem":{"x":{"y":1}}}`))
	f.Add([]byte(`{"Actions":{"Oem":{"#A.B":null}},"Members":[{"@odata.id":"/x"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []Object{&ComputerSystem{}, &LogEntry{}, &Task{}, &Session{}, &Collection{}} {
			if json.Unmarshal(b, v) != nil {
				continue
			}
			if _, err := json.Marshal(v); err != nil {
				t.Errorf("%T from %q cannot be encoded again: %v", v, b, err)
			}
		}
	})
}

// FuzzActions wants what is written without reflection to be what encoding/json would read back.
func FuzzActions(f *testing.F) {
	f.Add("#X.Y", "/t", "a title", "/i", "P", "v")
	f.Add("#a\"b", "<&>", "\\", "\xff", "é", "\u2028")
	f.Fuzz(func(t *testing.T, name, target, title, info, parameter, value string) {
		for _, s := range []string{name, target, title, info, parameter, value} {
			if !utf8.ValidString(s) {
				return // such bytes are replaced, by encoding/json as well
			}
		}
		in := Actions{name: {Target: target, Title: title, ActionInfo: info, Allowable: map[string][]string{parameter: {value}}}, "#Oem": {Target: target, OEM: true}}
		b, err := json.Marshal(struct{ Actions Actions }{in})
		if err != nil {
			t.Fatalf("%+v: %v", in, err)
		}
		var out struct {
			Actions map[string]map[string]any
		}
		if err := json.Unmarshal(b, &out); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if name == "Oem" || name == "#Oem" {
			return
		}
		got := out.Actions[name]
		values, _ := got[parameter+allowableValues].([]any)
		if got["target"] != target || title != "" && got["title"] != title || info != "" && got["@Redfish.ActionInfo"] != info || len(values) != 1 || values[0] != value {
			t.Errorf("%+v is written as %s", in, b)
		}
	})
}
