package service

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// filtered is the resource that TestFilter's expressions are about.
const filtered = `{"Name":"a'b","Count":18446744073709551615,"Small":-2.5,"On":true,"Status":{"Health":"OK"},"List":["x","y"],
	"Links":[{"@odata.id":"/1"},{"@odata.id":"/2"}],"Created":"2026-01-02T03:04:05Z","Nothing":null}`

func TestFilter(t *testing.T) {
	var v map[string]any
	if err := decodeExact([]byte(filtered), &v); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bool{
		`Name eq 'a''b'`:                             true,
		`Name ne 'a''b'`:                             false,
		`'a''b' eq Name`:                             true,
		`Name gt 'a'`:                                true,
		`'a' gt Name`:                                false,
		`Count eq 18446744073709551615`:              true,
		`Count gt 18446744073709551614`:              true,
		`Small lt -2`:                                true,
		`Small ge -2.5 and Small le -25e-1`:          true,
		`-2 gt Small`:                                true,
		`On eq true`:                                 true,
		`On ne false`:                                true,
		`On`:                                         false, // an error, see below
		`Status/Health eq 'OK'`:                      true,
		`Status/Health eq null`:                      false,
		`Status/State eq null`:                       true,
		`Missing/Below eq null`:                      true,
		`Nothing eq null`:                            true,
		`Name eq null`:                               false,
		`Missing ne 'x'`:                             true,
		`Missing gt 1`:                               false,
		`List eq 'y'`:                                true,
		`List eq 'z'`:                                false,
		`Links/@odata.id eq '/2'`:                    true,
		`Created lt '2026-01-02T04:04:06+01:00'`:     true,
		`Created eq '2026-01-02T04:04:05+01:00'`:     true,
		`not (On eq true)`:                           false,
		`not On eq false`:                            true,
		`On eq false and On eq false or On eq true`:  true,
		`On eq true or On eq true and On eq false`:   true,
		`(On eq true or On eq true) and On eq false`: false,
		`Name eq 7`:                                  false,
		`Name ne 7`:                                  true,
		`Status eq 'OK'`:                             false,
		`Count eq 1e999999999`:                       false,
	} {
		f, err := parseFilter(text)
		if text == "On" {
			if err == nil {
				t.Errorf("parseFilter(%s) = %+v; want an error", text, f)
			}
			continue
		}
		if err != nil {
			t.Errorf("parseFilter(%s): %v", text, err)
			continue
		}
		if got := f.match(v); got != want {
			t.Errorf("%s = %v; want %v", text, got, want)
		}
	}
}

func TestFilterErrors(t *testing.T) {
	for text, at := range map[string]int{
		"": 0, "Name": 4, "Name eq": 7, "Name eq 'x": 8, "Name is 'x'": 5, "(Name eq 1": 10, "Name eq 1)": 9, "Name eq Other": 0, "1 eq 1": 0,
		"Name eq 1 and": 13, "eq eq 1": 0, "Name eq 01": 8, "Na~me eq 1": 0, "a//b eq 1": 0, "Name eq 'x' 'y'": 12,
		strings.Repeat("(", 50) + "Name eq 1" + strings.Repeat(")", 50): maxFilterDepth + 1,
		strings.Repeat("not ", 50) + "Name eq 1":                        4 * (maxFilterDepth + 1),
		strings.Repeat("x", maxFilter+1):                                maxFilter,
	} {
		_, err := parseFilter(text)
		var e *filterError
		if !errors.As(err, &e) || e.at != at {
			t.Errorf("parseFilter(%.60q) = %v; want an error at byte %d", text, err, at)
		}
	}
}

func TestFilterQuery(t *testing.T) {
	s, _ := newTestService(t, Options{})
	s.Handle(testRoutes(t)...)
	p := newPeer(t, listen(t, s))
	const entries = "/redfish/v1/Systems/system/LogServices/Log/Entries"
	all := p.do("GET", entries, "")
	total := int(all.at("Members@odata.count").(float64))
	for filter, want := range map[string]int{
		"Id ne 'none'":                          total,
		"Id eq 'none'":                          0,
		"Id eq '3'":                             1,
		"Id eq '3' or Id eq '4'":                2,
		"@odata.id eq '" + entries + "/3'":      1,
		"not (Id eq '3') and EntryType ne null": total - 1,
	} {
		a := p.do("GET", entries+"?$filter="+url.QueryEscape(filter), "")
		if a.StatusCode != 200 || a.at("Members@odata.count") != float64(want) {
			t.Errorf("%s: status %d, count %v; want %d", filter, a.StatusCode, a.at("Members@odata.count"), want)
		}
	}
	a := p.do("GET", entries+"?$filter="+url.QueryEscape("Id ne '0'")+"&$skip=1&$top=1", "")
	if members, _ := a.at("Members").([]any); len(members) != 1 || a.at("Members@odata.count") != float64(total-1) || a.at("Members", 0, "Id") != "2" {
		t.Errorf("with $skip=1 and $top=1: %d members of %v, the first %v; want 1 of %d, the first 2", len(members), a.at("Members@odata.count"), a.at("Members", 0, "Id"), total-1)
	}
	// Members that are links are looked into as well.
	for filter, want := range map[string]float64{"UserName eq 'root'": 1, "UserName eq 'nobody'": 0} {
		a := p.do("GET", accountsURI+"?$filter="+url.QueryEscape(filter), "")
		if a.StatusCode != 200 || a.at("Members@odata.count") != want || want == 1 && a.at("Members", 0, "UserName") != nil {
			t.Errorf("%s: %d %s", filter, a.StatusCode, a.body)
		}
	}
	for path, status := range map[string]int{
		"/redfish/v1?$filter=Id%20eq%201":                            400,
		accountsURI + "?$filter=Id":                                  400,
		accountsURI + "?only&$filter=Id%20eq%20'1'":                  400,
		accountsURI + "?$filter=Id%20eq%20'1'&$filter=Id%20eq%20'1'": 400,
		accountsURI + "?excerpt&$select=Id":                          400,
		accountsURI + "?excerpt=1":                                   400,
		accountsURI + "?excerpt":                                     200,
		"/redfish/v1/Systems/system?excerpt":                         200,
	} {
		if a := p.do("GET", path, ""); a.StatusCode != status {
			t.Errorf("GET %s = %d; want %d\n%s", path, a.StatusCode, status, a.body)
		}
	}
}

func TestExcerpt(t *testing.T) {
	s, _ := newTestService(t, Options{})
	s.Handle(Route{
		URI: "/redfish/v1/Chassis/1/Sensors/{sensor}", Type: "Sensor.v1_12_0.Sensor", Excerpt: []string{"Reading"}, Entity: "Chassis",
		Get: sensorForTest,
	}, Route{URI: "/redfish/v1/Chassis/1/Sensors", Type: "SensorCollection.SensorCollection", Name: "Sensors", Entity: "Chassis", Members: Fixed("a", "b")})
	p := newPeer(t, listen(t, s))
	for _, path := range []string{"/redfish/v1/Chassis/1/Sensors/a?excerpt", "/redfish/v1/Chassis/1/Sensors?$expand=.&excerpt"} {
		a := p.do("GET", path, "")
		got := a.json
		if members, ok := got["Members"].([]any); ok {
			got, _ = members[1].(map[string]any)
		}
		if got["Reading"] != 7.0 || got["Name"] != nil || got["@odata.id"] == nil {
			t.Errorf("GET %s = %d %v", path, a.StatusCode, fmt.Sprint(got))
		}
	}
}

func FuzzFilter(f *testing.F) {
	for _, s := range []string{
		"Name eq 'x'", "not (A/B ge -1.5e3 and 'x''y' ne C) or D eq null", "a eq true", "((((", "'", "eq eq eq", "A eq 1e999999", "@odata.id eq '/x'", "A eq 'x' and", "\xff eq 1",
	} {
		f.Add(s)
	}
	var v map[string]any
	if err := decodeExact([]byte(filtered), &v); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := parseFilter(text)
		if (e == nil) == (err == nil) {
			t.Fatalf("parseFilter(%q) = %v, %v; want one of them", text, e, err)
		}
		if err != nil {
			var fe *filterError
			if !errors.As(err, &fe) || fe.at < 0 || fe.at > len(text) {
				t.Fatalf("parseFilter(%q): %v", text, err)
			}
			return
		}
		hit := e.match(v)
		inverse, err := parseFilter("not (" + text + ")")
		if err != nil {
			var fe *filterError
			if errors.As(err, &fe) && (fe.what == "it is too long" || fe.what == "it is nested too deep") {
				return
			}
			t.Fatalf("not (%q): %v", text, err)
		}
		if inverse.match(v) == hit {
			t.Errorf("%q and its negation agree", text)
		}
	})
}

// sensorReading is a resource with a property in its excerpt.
type sensorReading struct {
	schema.Resource
	Reading float64 `json:"Reading"`
}

func sensorForTest(*Request) (schema.Object, error) {
	return &sensorReading{Resource: schema.Resource{Name: "Sensor"}, Reading: 7}, nil
}
