package oem

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

type level int

func (l level) MarshalText() ([]byte, error) { return []byte("high"), nil }
func (l *level) UnmarshalText([]byte) error  { *l = 3; return nil }

type base struct {
	Address uint64 `json:"address"`
}

type inner struct {
	base
	Took  time.Duration `json:"took"`
	At    time.Time     `json:"at"`
	Level level         `json:"level"`
}

type outer struct {
	HostUUID string       `json:"hostUUID"`
	Empty    string       `json:"empty"`
	Never    time.Time    `json:"never"`
	None     *inner       `json:"none"`
	Inner    *inner       `json:"inner,omitempty"`
	List     []inner      `json:"list"`
	Share    float64      `json:"share"`
	Yes      bool         `json:"yes"`
	Bytes    []byte       `json:"bytes"`
	Link     *schema.Link `json:"link"`
	Secret   int          `json:"-"`
}

func example() outer {
	at := time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)
	return outer{
		HostUUID: "x", Inner: &inner{base: base{0xffffffff81000001}, Took: time.Second, At: at, Level: 3}, List: []inner{{Took: 1, At: at, Level: 3}},
		Share: 0.5, Yes: true, Bytes: []byte{1, 2}, Link: schema.LinkTo("/x"),
	}
}

func TestEncode(t *testing.T) {
	b, err := Encode(example())
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"Bytes":"AQI=","HostUUID":"x","Inner":{"Address":18446744071578845185,"At":"2026-01-02T03:04:05.0000006Z","Level":"high","Took":1000000000},` +
		`"Link":{"@odata.id":"/x"},"List":[{"Address":0,"At":"2026-01-02T03:04:05.0000006Z","Level":"high","Took":1}],"Share":0.5,"Yes":true}`
	if string(b) != want {
		t.Errorf("Encode = %s; want %s", b, want)
	}
	// The same Go type reads it, without a table of names.
	var back outer
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(example(), back, cmp.AllowUnexported(outer{}, inner{})); d != "" {
		t.Errorf("read back (-want +got):\n%s", d)
	}
}

func TestObject(t *testing.T) {
	o, err := Object("A.v1_0_0.B", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(o[Identifier]), `{"@odata.type":"#A.v1_0_0.B"}`; got != want {
		t.Errorf("Object = %s; want %s", got, want)
	}
	if o, err = Object("A.v1_0_0.B", base{7}); err != nil || string(o[Identifier]) != `{"@odata.type":"#A.v1_0_0.B","Address":7}` {
		t.Errorf("Object = %s, %v", o[Identifier], err)
	}
	if _, err := Object("A.v1_0_0.B", func() {}); err == nil {
		t.Error("Object of a function succeeded")
	}
}

func TestCSDL(t *testing.T) {
	type resource struct {
		schema.Resource
		State Value[outer]
	}
	s := Schema{
		Name: "Example", Version: "v1_0_0", Purpose: "An example.", Resource: resource{}, URIs: []string{"/redfish/v1/Example"},
		Objects: map[string]any{"Thing": outer{}},
		Actions: []Action{{Name: "Do", Description: "Does.", Bound: "ComputerSystem.v1_0_0.OemActions", Parameters: []Parameter{{Name: "What", Type: "Edm.String", Required: true}}}},
	}
	csdl := s.CSDL()
	dec := xml.NewDecoder(bytes.NewReader(csdl))
	for {
		if _, err := dec.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("not XML: %v", err)
		}
	}
	for _, want := range []string{
		`<EntityType Name="Example" BaseType="Example.Example">`,
		`<Property Name="State" Type="Example.v1_0_0.OemOuter"`,
		`<ComplexType Name="Thing" BaseType="Resource.OemObject">`,
		`<Property Name="HostUUID" Type="Edm.String"`,
		`<Property Name="Took" Type="Edm.Int64"`,
		`<Property Name="At" Type="Edm.DateTimeOffset"`,
		`<Property Name="Address" Type="Edm.Int64"`,
		`<Property Name="Level" Type="Edm.String"`,
		`<Property Name="List" Type="Collection(Example.v1_0_0.OemInner)"`,
		`<NavigationProperty Name="Link" Type="Resource.Resource"`,
		`<Action Name="Do" IsBound="true">`,
		`<Parameter Name="ComputerSystem" Type="ComputerSystem.v1_0_0.OemActions"/>`,
	} {
		if !strings.Contains(string(csdl), want) {
			t.Errorf("no %s in\n%s", want, csdl)
		}
	}
	for _, not := range []string{"Secret", `"@`, `Property Name="Name"`} {
		if strings.Contains(string(csdl), not) {
			t.Errorf("%s is in\n%s", not, csdl)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("a type that cannot be described was taken")
		}
	}()
	Schema{Name: "X", Version: "v1_0_0", Objects: map[string]any{"Thing": struct{ M map[string]int }{}}}.CSDL()
}

func TestWords(t *testing.T) {
	for in, want := range map[string]string{"LastRun": "last run", "HostUUID": "host UUID", "PID": "PID", "TimerIRQs": "timer IRQs", "KThread": "K thread", "CPUs": "CPUs", "Id": "id"} {
		if got := words(in); got != want {
			t.Errorf("words(%s) = %q; want %q", in, got, want)
		}
	}
}
