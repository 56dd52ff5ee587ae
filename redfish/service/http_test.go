package service

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// testRoutes are resources that the BMC has not: a log, a parametrised family, an action that runs as a task.
func testRoutes(t testing.TB) []Route {
	entries := func(*Request) (Listing, error) {
		return Listing{Len: 1200, ID: strconv.Itoa, At: func(i int) (schema.Object, error) {
			return &schema.LogEntry{Resource: schema.Resource{Name: "Entry"}, EntryType: "Event", Message: fmt.Sprint("message ", i)}, nil
		}}, nil
	}
	return []Route{
		{URI: "/redfish/v1/Systems/system/LogServices", Type: schema.TypeLogServiceCollection, Name: "Logs", Members: Fixed("Log")},
		{
			URI: "/redfish/v1/Systems/system/LogServices/{log}", Type: schema.TypeLogService,
			Get: func(r *Request) (schema.Object, error) {
				switch r.Param("log") {
				case "Log":
					return &schema.LogService{Resource: schema.Resource{Name: "Log"}, Entries: schema.LinkTo(r.URI + "/Entries")}, nil
				case "Broken":
					return nil, errors.New("the secret reason")
				case "Panic":
					panic("the secret reason")
				}
				return nil, ErrNotFound
			},
			Actions: []Action{
				{Name: "LogService.ClearLog", Do: func(*Request, Values) (*Reply, error) { return nil, nil }},
				{
					Name: "LogService.CollectDiagnosticData", Parameters: []Property{{Name: "Fail", Kind: Boolean}, {Name: "Wait", Kind: Boolean}},
					Do: func(r *Request, v Values) (*Reply, error) {
						return r.Task("Collect", func(ctx context.Context, task *Task) (*Reply, error) {
							task.Progress(50, "half")
							if v.Bool("Wait") {
								<-ctx.Done()
								return nil, ctx.Err()
							}
							if v.Bool("Fail") {
								return nil, Because(409, "ResourceInUse", "It is in use.")
							}
							return nil, task.SetOEM("test", map[string]int{"Answer": 42})
						})
					},
				},
			},
		},
		{URI: "/redfish/v1/Systems/system/LogServices/{log}/Entries", Type: schema.TypeLogEntryCollection, Name: "Entries", Entries: entries},
	}
}

// newTree returns a peer of a service with everything that tests look at.
func newTree(t testing.TB, o Options) (*Service, *peer, *fakePower) {
	s, power := newTestService(t, o)
	s.Handle(testRoutes(t)...)
	return s, newPeer(t, listen(t, s)), power
}

func TestAnswers(t *testing.T) {
	_, p, _ := newTree(t, Options{})
	const system = "/redfish/v1/Systems/system"
	const reset = system + "/Actions/ComputerSystem.Reset"
	for _, tc := range []struct {
		name         string
		method, path string
		body         string
		headers      []string
		status       int
		message      string // Id of the first extended message
		property     string // that the message is about
	}{
		{"root without slash", "GET", "/redfish/v1", "", []string{"Authorization", ""}, 200, "", ""},
		{"root", "GET", "/redfish/v1/", "", []string{"Authorization", ""}, 200, "", ""},
		{"versions", "GET", "/redfish", "", []string{"Authorization", ""}, 200, "", ""},
		{"odata", "GET", "/redfish/v1/odata", "", []string{"Authorization", ""}, 200, "", ""},
		{"metadata", "GET", "/redfish/v1/$metadata", "", []string{"Authorization", ""}, 200, "", ""},
		{"index", "GET", "/", "", []string{"Authorization", ""}, 200, "", ""},
		{"trailing slash", "GET", system + "/", "", nil, 200, "", ""},
		{"two slashes", "GET", system + "//", "", nil, 404, "InvalidURI", ""},
		{"slash inside", "GET", "/redfish/v1//Systems", "", nil, 404, "InvalidURI", ""},
		{"encoded slash", "GET", "/redfish/v1/Systems%2fsystem", "", nil, 404, "InvalidURI", ""},
		{"dots", "GET", "/redfish/v1/Systems/%2e%2e/Systems", "", nil, 404, "InvalidURI", ""},
		{"unknown", "GET", "/redfish/v1/Nothing", "", nil, 404, "InvalidURI", ""},
		{"unknown, not logged in", "POST", "/api/session", "{}", []string{"Authorization", ""}, 404, "InvalidURI", ""},
		{"unknown member", "GET", "/redfish/v1/Systems/other", "", nil, 404, "InvalidURI", ""},
		{"unknown log", "GET", system + "/LogServices/Other", "", nil, 404, "ResourceNotFound", ""},
		{"unknown entry", "GET", system + "/LogServices/Log/Entries/9999", "", nil, 404, "ResourceNotFound", ""},
		{"not logged in", "GET", system, "", []string{"Authorization", ""}, 401, "NoValidSession", ""},
		{"wrong password", "GET", system, "", []string{"Authorization", "Basic cm9vdDp3cm9uZw=="}, 401, "NoValidSession", ""},
		{"broken Authorization", "GET", system, "", []string{"Authorization", "Basic !!"}, 401, "NoValidSession", ""},
		{"other scheme", "GET", system, "", []string{"Authorization", "Digest x"}, 401, "NoValidSession", ""},
		{"wrong token", "GET", system, "", []string{"X-Auth-Token", "nonsense"}, 401, "NoValidSession", ""},
		{"method not allowed", "DELETE", system, "", nil, 405, "OperationNotAllowed", ""},
		{"method not allowed, not logged in", "PUT", system, "{}", []string{"Authorization", ""}, 405, "OperationNotAllowed", ""},
		{"unknown method", "BREW", system, "", nil, 501, "OperationNotAllowed", ""},
		{"method in lower case", "get", system, "", nil, 501, "OperationNotAllowed", ""},
		{"GET of an action", "GET", reset, "", nil, 405, "OperationNotAllowed", ""},
		{"PATCH of a collection", "PATCH", "/redfish/v1/Systems", "{}", nil, 405, "OperationNotAllowed", ""},
		{"OData-Version", "GET", system, "", []string{"OData-Version", "4.0"}, 200, "", ""},
		{"wrong OData-Version", "GET", system, "", []string{"OData-Version", "4.1"}, 412, "HeaderInvalid", ""},
		{"Accept", "GET", system, "", []string{"Accept", "text/html, application/*;q=0.8"}, 200, "", ""},
		{"wrong Accept", "GET", system, "", []string{"Accept", "text/html"}, 406, "HeaderInvalid", ""},
		{"refused Accept", "GET", system, "", []string{"Accept", "application/json;q=0"}, 406, "HeaderInvalid", ""},

		{"reset", "POST", reset, `{"ResetType":"ForceRestart"}`, nil, 204, "", ""},
		{"reset with If-Match", "POST", reset, `{"ResetType":"ForceRestart"}`, []string{"If-Match", `W/"other"`}, 204, "", ""},
		{"reset, not logged in", "POST", reset, `{"ResetType":"On"}`, []string{"Authorization", ""}, 401, "NoValidSession", ""},
		{"missing parameter", "POST", reset, `{}`, nil, 400, "ActionParameterMissing", "ResetType"},
		{"no body", "POST", reset, "", nil, 400, "ActionParameterMissing", "ResetType"},
		{"wrong value", "POST", reset, `{"ResetType":"Explode"}`, nil, 400, "ActionParameterValueNotInList", "ResetType"},
		{"wrong type", "POST", reset, `{"ResetType":1}`, nil, 400, "ActionParameterValueTypeError", "ResetType"},
		{"null", "POST", reset, `{"ResetType":null}`, nil, 400, "ActionParameterValueTypeError", "ResetType"},
		{"unknown parameter", "POST", reset, `{"ResetType":"On","Force":true}`, nil, 400, "ActionParameterUnknown", "Force"},
		{"annotation", "POST", reset, `{"ResetType":"On","@odata.id":"x"}`, nil, 204, "", ""},
		{"malformed JSON", "POST", reset, `{"ResetType":`, nil, 400, "MalformedJSON", ""},
		{"comma", "POST", reset, `{"ResetType":"On",}`, nil, 400, "MalformedJSON", ""},
		{"two documents", "POST", reset, `{"ResetType":"On"}{}`, nil, 400, "MalformedJSON", ""},
		{"not UTF-8", "POST", reset, "{\"ResetType\":\"\xff\"}", nil, 400, "MalformedJSON", ""},
		{"array", "POST", reset, `["On"]`, nil, 400, "UnrecognizedRequestBody", ""},
		{"twice", "POST", reset, `{"ResetType":"On","ResetType":"ForceOff"}`, nil, 400, "PropertyDuplicate", "ResetType"},
		{"deep", "POST", reset, `{"ResetType":` + strings.Repeat("[", 11) + strings.Repeat("]", 11) + "}", nil, 400, "MalformedJSON", ""},
		{"very deep", "POST", reset, strings.Repeat("[", 60000), nil, 400, "MalformedJSON", ""},
		{"huge", "POST", reset, `{"ResetType":"` + strings.Repeat("x", 65<<10) + `"}`, nil, 413, "PayloadTooLarge", ""},
		{"form", "POST", reset, "ResetType=On", []string{"Content-Type", "application/x-www-form-urlencoded"}, 415, "HeaderInvalid", ""},
		{"charset", "POST", reset, `{"ResetType":"On"}`, []string{"Content-Type", "application/json; charset=latin1"}, 415, "HeaderInvalid", ""},
		{"unknown action", "POST", system + "/Actions/ComputerSystem.Decommission", "{}", nil, 404, "InvalidURI", ""},
		{"action of a missing resource", "POST", system + "/LogServices/Other/Actions/LogService.ClearLog", "{}", nil, 404, "ResourceNotFound", ""},
		{"query with POST", "POST", reset + "?$select=Name", `{"ResetType":"On"}`, nil, 400, "QueryNotSupportedOnOperation", ""},

		{"patch", "PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"Pxe"}}`, nil, 200, "", ""},
		{"patch read-only", "PATCH", system, `{"PowerState":"Off"}`, nil, 400, "PropertyNotWritable", "PowerState"},
		{"patch unknown", "PATCH", system, `{"Color":"red"}`, nil, 400, "PropertyUnknown", "Color"},
		{"patch unknown inside", "PATCH", system, `{"Boot":{"Color":"red"}}`, nil, 400, "PropertyUnknown", "Boot/Color"},
		{"patch wrong value", "PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"Tape"}}`, nil, 400, "PropertyValueNotInList", "Boot/BootSourceOverrideTarget"},
		{"patch wrong type", "PATCH", system, `{"Boot":{"BootSourceOverrideTarget":{}}}`, nil, 400, "PropertyValueTypeError", "Boot/BootSourceOverrideTarget"},
		{"patch nothing", "PATCH", system, `{}`, nil, 400, "EmptyJSON", ""},
		{"patch annotations only", "PATCH", system, `{"@odata.id":"/x"}`, nil, 400, "NoOperation", ""},
		{"patch with wrong If-Match", "PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"Pxe"}}`, []string{"If-Match", `W/"other"`}, 412, "PreconditionFailed", ""},
		{"patch of a number", "PATCH", "/redfish/v1/SessionService", `{"SessionTimeout":600}`, nil, 200, "", ""},
		{"patch of a number, out of range", "PATCH", "/redfish/v1/SessionService", `{"SessionTimeout":1}`, nil, 400, "PropertyValueOutOfRange", "SessionTimeout"},
		{"patch of a number, fraction", "PATCH", "/redfish/v1/SessionService", `{"SessionTimeout":600.5}`, nil, 400, "PropertyValueTypeError", "SessionTimeout"},

		{"bad $filter", "GET", "/redfish/v1/Systems?$filter=Name", "", nil, 400, "QueryParameterValueFormatError", ""},
		{"unknown $", "GET", system + "?$nonsense=1", "", nil, 501, "QueryParameterUnsupported", ""},
		{"unknown option", "GET", system + "?nonsense=1", "", nil, 200, "", ""},
		{"bad $expand", "GET", "/redfish/v1/Systems?$expand=all", "", nil, 400, "QueryParameterValueFormatError", ""},
		{"bad $levels", "GET", "/redfish/v1/Systems?$expand=.($levels=x)", "", nil, 400, "QueryParameterValueTypeError", ""},
		{"deep $levels", "GET", "/redfish/v1/Systems?$expand=.($levels=99)", "", nil, 400, "QueryParameterOutOfRange", ""},
		{"bad $select", "GET", system + "?$select=", "", nil, 400, "QueryParameterValueFormatError", ""},
		{"bad $top", "GET", "/redfish/v1/Systems?$top=x", "", nil, 400, "QueryParameterValueTypeError", ""},
		{"negative $skip", "GET", "/redfish/v1/Systems?$skip=-1", "", nil, 400, "QueryParameterOutOfRange", ""},
		{"$top of a resource", "GET", system + "?$top=1", "", nil, 400, "QueryNotSupportedOnResource", ""},
		{"only=x", "GET", "/redfish/v1/Systems?only=x", "", nil, 400, "QueryParameterValueFormatError", ""},
		{"only and $expand", "GET", "/redfish/v1/Systems?only&$expand=.", "", nil, 400, "QueryCombinationInvalid", ""},
		{"bad escape", "GET", "/redfish/v1/Systems?$top=%zz", "", nil, 400, "QueryParameterValueFormatError", ""},

		{"our own trouble", "GET", system + "/LogServices/Broken", "", nil, 500, "InternalError", ""},
		{"panic", "GET", system + "/LogServices/Panic", "", nil, 500, "InternalError", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p.t = t
			a := p.do(tc.method, tc.path, tc.body, tc.headers...)
			if a.StatusCode != tc.status || a.messageID() != tc.message {
				t.Fatalf("%s %s = %d %q; want %d %q\n%s", tc.method, tc.path, a.StatusCode, a.messageID(), tc.status, tc.message, a.body)
			}
			related := ""
			if tc.property != "" {
				related = "#/" + tc.property
			}
			if got, _ := a.at("error", "@Message.ExtendedInfo", 0, "RelatedProperties", 0).(string); got != related {
				t.Errorf("message is about %q; want %q", got, related)
			}
			if v := a.Header.Get("OData-Version"); v != "4.0" {
				t.Errorf("OData-Version %q", v)
			}
			if a.Header.Get("Cache-Control") == "" {
				t.Error("no Cache-Control")
			}
			if tc.status == 405 && a.Header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
			if tc.status == 401 && a.Header.Get("WWW-Authenticate") == "" {
				t.Error("401 without WWW-Authenticate")
			}
			if strings.Contains(string(a.body), "secret") {
				t.Errorf("the answer tells a secret: %s", a.body)
			}
		})
	}
}

func TestHeadersOfResources(t *testing.T) {
	_, p, _ := newTree(t, Options{})
	get := p.do("GET", "/redfish/v1/Systems/system", "")
	head := p.do("HEAD", "/redfish/v1/Systems/system", "")
	if len(head.body) != 0 || head.ContentLength != int64(len(get.body)) {
		t.Errorf("HEAD: %d bytes, Content-Length %d; want 0, %d", len(head.body), head.ContentLength, len(get.body))
	}
	for _, name := range []string{"Allow", "Link", "ETag", "Content-Type", "OData-Version"} {
		if get.Header.Get(name) == "" || get.Header.Get(name) != head.Header.Get(name) {
			t.Errorf("%s: GET %q, HEAD %q; want the same", name, get.Header.Get(name), head.Header.Get(name))
		}
	}
	if got, want := get.Header.Get("Link"), "<http://redfish.dmtf.org/schemas/v1/ComputerSystem.v1_27_0.json>; rel=describedby"; got != want {
		t.Errorf("Link = %q; want %q", got, want)
	}
	if got, want := get.Header.Get("Allow"), "GET, HEAD, PATCH"; got != want {
		t.Errorf("Allow = %q; want %q", got, want)
	}
	if got := get.at("@odata.etag"); got != get.Header.Get("ETag") {
		t.Errorf("@odata.etag = %v; ETag = %s", got, get.Header.Get("ETag"))
	}
}

func TestETags(t *testing.T) {
	_, p, power := newTree(t, Options{})
	const system = "/redfish/v1/Systems/system"
	etag := p.do("GET", system, "").Header.Get("ETag")
	if a := p.do("GET", system, "", "If-None-Match", etag); a.StatusCode != 304 || len(a.body) != 0 {
		t.Errorf("If-None-Match: %d; want 304", a.StatusCode)
	}
	if a := p.do("PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"Cd"}}`, "If-Match", etag); a.StatusCode != 200 {
		t.Errorf("If-Match: %d; want 200", a.StatusCode)
	}
	if a := p.do("PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"Hdd"}}`, "If-Match", etag); a.StatusCode != 412 {
		t.Errorf("stale If-Match: %d; want 412", a.StatusCode)
	}
	if power.boot[1] != "Cd" {
		t.Errorf("boot target %q; want Cd", power.boot[1])
	}
	if a := p.do("GET", system, "", "If-None-Match", etag); a.StatusCode != 200 {
		t.Errorf("stale If-None-Match: %d; want 200", a.StatusCode)
	}
}

// What a client changes is guarded against what others change, not against readings that move.
func TestETagsOfSettings(t *testing.T) {
	_, p, power := newTree(t, Options{})
	const system = "/redfish/v1/Systems/system"
	etag, part := p.do("GET", system, "").Header.Get("ETag"), p.do("GET", system+"?$select=Boot", "").Header.Get("ETag")
	if etag == part {
		t.Errorf("the whole and a part have the tag %s", etag)
	}
	if a := p.do("POST", system+"/Actions/ComputerSystem.Reset", `{"ResetType":"ForceOff"}`); a.StatusCode/100 != 2 {
		t.Fatalf("reset: %d", a.StatusCode)
	}
	if a := p.do("GET", system, "", "If-None-Match", etag); a.StatusCode != 200 {
		t.Fatalf("GET after the power state has changed: %d; want 200", a.StatusCode)
	}
	for i, tag := range []string{etag, strings.TrimPrefix(etag, "W/"), strings.Trim(strings.TrimPrefix(etag, "W/"), `"`), part} {
		if a := p.do("PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"`+power.boot[1]+`"}}`, "If-Match", tag); a.StatusCode != 200 {
			t.Errorf("PATCH %d with a tag of the same settings: %d; want 200", i, a.StatusCode)
		}
	}
	if a := p.do("PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"Cd"}}`, "If-Match", part); a.StatusCode != 200 {
		t.Errorf("PATCH: %d; want 200", a.StatusCode)
	}
	if a := p.do("PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"Hdd"}}`, "If-Match", part); a.StatusCode != 412 {
		t.Errorf("PATCH of what another has set meanwhile: %d; want 412", a.StatusCode)
	}
}

func TestMatchesETag(t *testing.T) {
	const etag = `W/"abc"`
	for _, tc := range []struct {
		list string
		want bool
	}{
		{`W/"abc"`, true},
		{`"abc"`, true},
		{`abc`, true},
		{`*`, true},
		{`"x", W/"abc"`, true},
		{`"x",W/"abc" ,"y"`, true},
		{`W/"abc"foobar`, false},
		{`W/"abcd"`, false},
		{`"a,bc"`, false},
		{`"abc`, false},
		{``, false},
		{`,,,`, false},
		{`W/`, false},
	} {
		if got := matchesETag([]string{tc.list}, etag, same); got != tc.want {
			t.Errorf("matchesETag(%s) = %v; want %v", tc.list, got, tc.want)
		}
	}
}

func TestPatchWritesWhatItCan(t *testing.T) {
	_, p, power := newTree(t, Options{})
	a := p.do("PATCH", "/redfish/v1/Systems/system", `{"Boot":{"BootSourceOverrideTarget":"Pxe","BootSourceOverrideMode":"Steam"},"Name":"x","Color":"red"}`)
	if a.StatusCode != 200 || power.boot[1] != "Pxe" {
		t.Fatalf("PATCH = %d, boot target %q; want 200, Pxe", a.StatusCode, power.boot[1])
	}
	var got []string
	list, _ := a.at("@Message.ExtendedInfo").([]any)
	for i := range list {
		got = append(got, fmt.Sprint(a.at("@Message.ExtendedInfo", i, "RelatedProperties", 0), " ", strings.TrimPrefix(a.at("@Message.ExtendedInfo", i, "MessageId").(string), baseRegistry)))
	}
	want := []string{"#/Boot/BootSourceOverrideMode PropertyValueNotInList", "#/Name PropertyNotWritable", "#/Color PropertyUnknown"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("messages (-want +got):\n%s", d)
	}
}

func TestQueries(t *testing.T) {
	_, p, _ := newTree(t, Options{})
	keys := func(v any) (out []string) {
		m, _ := v.(map[string]any)
		for k := range m {
			if !strings.HasPrefix(k, "@odata.") {
				out = append(out, k)
			}
		}
		slices.Sort(out)
		return out
	}
	t.Run("select", func(t *testing.T) {
		a := p.do("GET", "/redfish/v1/Systems/system?$select=PowerState,Status/Health", "")
		if d := cmp.Diff([]string{"PowerState", "Status"}, keys(a.json)); d != "" {
			t.Errorf("properties (-want +got):\n%s", d)
		}
		if d := cmp.Diff([]string{"Health"}, keys(a.at("Status"))); d != "" {
			t.Errorf("Status (-want +got):\n%s", d)
		}
		if a.at("@odata.id") == nil || a.at("@odata.etag") != a.Header.Get("ETag") {
			t.Errorf("@odata.id %v, @odata.etag %v, ETag %s", a.at("@odata.id"), a.at("@odata.etag"), a.Header.Get("ETag"))
		}
	})
	t.Run("expand", func(t *testing.T) {
		a := p.do("GET", "/redfish/v1/Systems?$expand=.", "")
		if got := a.at("Members", 0, "PowerState"); got != "On" {
			t.Errorf("expanded member has PowerState %v", got)
		}
		if got := keys(a.at("Members", 0, "Links", "Chassis", 0)); got != nil {
			t.Errorf("$expand=. went into Links: %v", got)
		}
		a = p.do("GET", "/redfish/v1/Systems/system?$expand=~", "")
		if got := a.at("Links", "Chassis", 0, "ChassisType"); got != "RackMount" {
			t.Errorf("$expand=~ left Links alone: %v", got)
		}
		a = p.do("GET", "/redfish/v1/Systems?$expand=*($levels=2)", "")
		if got := a.at("Members", 0, "Links", "Chassis", 0, "ChassisType"); got != "RackMount" {
			t.Errorf("two levels: ChassisType %v", got)
		}
		if got := keys(a.at("Members", 0, "Links", "Chassis", 0, "Links", "ManagedBy", 0)); got != nil {
			t.Errorf("two levels went three deep: %v", got)
		}
	})
	t.Run("expand and select", func(t *testing.T) {
		a := p.do("GET", "/redfish/v1/Systems?$expand=.&$select=PowerState", "")
		if d := cmp.Diff([]string{"PowerState"}, keys(a.at("Members", 0))); d != "" {
			t.Errorf("member (-want +got):\n%s", d)
		}
	})
	t.Run("only", func(t *testing.T) {
		if a := p.do("GET", "/redfish/v1/Systems?only", ""); a.at("@odata.id") != "/redfish/v1/Systems/system" {
			t.Errorf("only gave %v", a.at("@odata.id"))
		}
		if a := p.do("GET", "/redfish/v1/AccountService/Roles?only", ""); a.at("Members@odata.count") != 3.0 {
			t.Errorf("only of three gave %v", a.json)
		}
	})
	t.Run("pages", func(t *testing.T) {
		uri := "/redfish/v1/Systems/system/LogServices/Log/Entries"
		seen := 0
		for pages := 0; uri != ""; pages++ {
			a := p.do("GET", uri, "")
			list, _ := a.at("Members").([]any)
			if a.at("Members@odata.count") != 1200.0 || len(list) > 500 || pages > 5 {
				t.Fatalf("page of %d, count %v", len(list), a.at("Members@odata.count"))
			}
			if len(list) > 0 && a.at("Members", 0, "Id") != fmt.Sprint(seen) {
				t.Errorf("page begins with %v; want %d", a.at("Members", 0, "Id"), seen)
			}
			seen += len(list)
			uri, _ = a.at("Members@odata.nextLink").(string)
		}
		if seen != 1200 {
			t.Errorf("%d entries in all pages; want 1200", seen)
		}
	})
	t.Run("top and skip", func(t *testing.T) {
		a := p.do("GET", "/redfish/v1/AccountService/Roles?$skip=1&$top=1", "")
		list, _ := a.at("Members").([]any)
		if len(list) != 1 || a.at("Members", 0, "@odata.id") != "/redfish/v1/AccountService/Roles/Operator" || a.at("Members@odata.count") != 3.0 {
			t.Errorf("second of three: %s", a.body)
		}
		a = p.do("GET", "/redfish/v1/AccountService/Roles?$skip=9", "")
		if list, _ := a.at("Members").([]any); list == nil || len(list) != 0 {
			t.Errorf("behind the end: %s", a.body)
		}
	})
	t.Run("expanding too much", func(t *testing.T) {
		s, _ := newTestService(t, Options{Limits: Limits{Expanded: 3}})
		p := newPeer(t, listen(t, s))
		if a := p.do("GET", "/redfish/v1/?$expand=*($levels=4)", ""); a.StatusCode != 400 || a.messageID() != "QueryParameterOutOfRange" {
			t.Errorf("= %d %s", a.StatusCode, a.messageID())
		}
	})
}

func TestTasks(t *testing.T) {
	_, p, _ := newTree(t, Options{})
	const collect = "/redfish/v1/Systems/system/LogServices/Log/Actions/LogService.CollectDiagnosticData"
	start := func(body string) (monitor string) {
		t.Helper()
		a := p.do("POST", collect, body)
		if a.StatusCode != 202 || a.Header.Get("Location") == "" || a.at("TaskMonitor") != a.Header.Get("Location") || a.at("@odata.id") == nil {
			t.Fatalf("POST = %d, Location %q\n%s", a.StatusCode, a.Header.Get("Location"), a.body)
		}
		return a.Header.Get("Location")
	}
	finish := func(monitor string) answer {
		t.Helper()
		for {
			a := p.do("GET", monitor, "")
			if a.StatusCode != 202 {
				return a
			}
		}
	}
	a := finish(start(`{}`))
	if a.StatusCode != 200 || a.at("TaskState") != "Completed" || a.at("PercentComplete") != 100.0 || a.at("Oem", "test", "Answer") != 42.0 {
		t.Errorf("monitor at the end = %d\n%s", a.StatusCode, a.body)
	}
	if got := a.at("Payload", "TargetUri"); got != collect {
		t.Errorf("Payload/TargetUri = %v", got)
	}
	if a := finish(start(`{"Fail":true}`)); a.StatusCode != 409 || a.messageID() != "ResourceInUse" {
		t.Errorf("monitor of a failed task = %d %s", a.StatusCode, a.messageID())
	}
	monitor := start(`{"Wait":true}`)
	if a := p.do("GET", strings.TrimSuffix(monitor, "/Monitor"), ""); a.at("TaskState") != "Running" {
		t.Errorf("TaskState = %v; want Running", a.at("TaskState"))
	}
	if a := p.do("DELETE", monitor, ""); a.StatusCode != 204 {
		t.Errorf("DELETE of the monitor = %d", a.StatusCode)
	}
	if a := p.do("GET", monitor, ""); a.StatusCode != 404 {
		t.Errorf("GET of a cancelled task's monitor = %d; want 404", a.StatusCode)
	}
	if a := p.do("GET", "/redfish/v1/TaskService/Tasks", ""); a.at("Members@odata.count") != 2.0 {
		t.Errorf("tasks left: %s", a.body)
	}
}

func TestTasksAreBounded(t *testing.T) {
	_, p, _ := newTree(t, Options{Limits: Limits{Tasks: 3}})
	const collect = "/redfish/v1/Systems/system/LogServices/Log/Actions/LogService.CollectDiagnosticData"
	for range 3 {
		if a := p.do("POST", collect, `{"Wait":true}`); a.StatusCode != 202 {
			t.Fatalf("POST = %d", a.StatusCode)
		}
	}
	if a := p.do("POST", collect, `{}`); a.StatusCode != 503 {
		t.Errorf("the fourth task = %d; want 503", a.StatusCode)
	}
	p.do("DELETE", "/redfish/v1/TaskService/Tasks/1", "")
	for range 5 { // those that end make room for each other
		a := p.do("POST", collect, `{}`)
		if a.StatusCode != 202 {
			t.Fatalf("after a cancellation: %d; want 202", a.StatusCode)
		}
		for p.do("GET", a.Header.Get("Location"), "").StatusCode == 202 {
		}
	}
}

// TestTree walks all links from the root and wants each to lead to a resource of the service.
func TestTree(t *testing.T) {
	_, p, _ := newTree(t, Options{})
	seen := map[string]bool{}
	todo := []string{"/redfish/v1/"}
	var links func(v any) []string
	links = func(v any) (out []string) {
		switch v := v.(type) {
		case map[string]any:
			if id, ok := v["@odata.id"].(string); ok {
				out = append(out, id)
			}
			for _, item := range v {
				out = append(out, links(item)...)
			}
			for _, name := range []string{"@Redfish.ActionInfo", "@odata.nextLink"} {
				if id, ok := v[name].(string); ok {
					out = append(out, id)
				}
			}
		case []any:
			for _, item := range v {
				out = append(out, links(item)...)
			}
		}
		return out
	}
	for len(todo) > 0 {
		uri := todo[0]
		todo = todo[1:]
		if seen[uri] || strings.Contains(uri, "/Entries/") {
			continue
		}
		seen[uri] = true
		a := p.do("GET", uri, "")
		if a.StatusCode != 200 {
			t.Errorf("GET %s = %d", uri, a.StatusCode)
			continue
		}
		if id := a.at("@odata.id"); id != uri {
			t.Errorf("GET %s: @odata.id %v", uri, id)
		}
		if a.at("@odata.type") == nil || a.at("Name") == nil {
			t.Errorf("GET %s: no @odata.type or no Name", uri)
		}
		todo = append(todo, links(a.json)...)
	}
	if len(seen) < 40 {
		t.Errorf("only %d resources are reachable", len(seen))
	}
}

func TestHandleRefusesWhatCannotWork(t *testing.T) {
	get := func(*Request) (schema.Object, error) { return nil, ErrNotFound }
	for name, r := range map[string]Route{
		"nothing to get":         {URI: "/redfish/v1/X", Type: "X.v1_0_0.X"},
		"two ways to get":        {URI: "/redfish/v1/X", Type: "X.v1_0_0.X", Get: get, Members: Fixed()},
		"no type":                {URI: "/redfish/v1/X", Get: get},
		"a slash":                {URI: "/redfish/v1/X/", Type: "X.v1_0_0.X", Get: get},
		"taken":                  {URI: "/redfish/v1/Systems", Type: "X.v1_0_0.X", Get: get},
		"deletable collection":   {URI: "/redfish/v1/X", Type: "X.X", Members: Fixed(), Delete: func(*Request) error { return nil }},
		"creation in a resource": {URI: "/redfish/v1/X", Type: "X.v1_0_0.X", Get: get, Create: &Create{}},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := newTestService(t, Options{})
			defer func() {
				if recover() == nil {
					t.Error("Handle took it")
				}
			}()
			s.Handle(r)
		})
	}
}
