package service

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"unicode/utf8"
)

func FuzzParseQuery(f *testing.F) {
	for _, s := range []string{"", "$expand=.($levels=2)&$select=Name,Status/Health", "only", "$top=1&$skip=2", "a=b&%zz", "$expand=*&$expand=~", "&&="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		q, e := parseQuery(raw)
		if e != nil {
			if e.Status != 400 && e.Status != 501 {
				t.Errorf("parseQuery(%q): status %d", raw, e.Status)
			}
			return
		}
		if q.levels < 0 || q.levels > maxExpandLevels || q.top < -1 || q.skip < 0 || (q.expand == 0) != (q.levels == 0) {
			t.Errorf("parseQuery(%q) = %+v", raw, q)
		}
		for _, path := range q.selected {
			for _, name := range path {
				if name == "" {
					t.Errorf("parseQuery(%q) selects %q", raw, path)
				}
			}
		}
		choose(map[string]any{"Members": []any{map[string]any{"Name": "x"}}, "Status": map[string]any{"Health": "OK"}}, q.selected, true)
	})
}

func FuzzParseBasic(f *testing.F) {
	for _, s := range []string{"Basic cm9vdDpwYXNz", "basic cm9vdDo=", "Basic !!", "Basic", "Bearer x", "Basic OnBhc3M="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		user, password, ok := parseBasic(header)
		if !ok {
			return
		}
		if user == "" || strings.Contains(user, ":") || !utf8.ValidString(password) {
			t.Errorf("parseBasic(%q) = %q, %q", header, user, password)
		}
	})
}

func FuzzMatchesETag(f *testing.F) {
	for _, s := range []string{`W/"abc"`, `"x", "y"`, `*`, `,W/,"`, `abc`, `"abc"x,"abc"`} {
		f.Add(s, `W/"abc"`)
	}
	f.Fuzz(func(t *testing.T, list, etag string) {
		got := matchesETag([]string{list}, etag, same)
		if got && !strings.Contains(list, "*") && !strings.Contains(list, strings.Trim(strings.TrimPrefix(etag, "W/"), `"`)) {
			t.Errorf("matchesETag(%q, %q): the tag is not in the list", list, etag)
		}
		if strings.Count(etag, `"`) == 2 && len(etag) > 4 && strings.HasPrefix(etag, `W/"`) && strings.HasSuffix(etag, `"`) && !matchesETag([]string{etag}, etag, same) {
			t.Errorf("matchesETag(%q) does not match itself", etag)
		}
	})
}

// fuzzProperties have one of each kind.
var fuzzProperties = []Property{
	{Name: "Text", Kind: String, Values: []string{"a", "b"}, Null: true},
	{Name: "Flag", Kind: Boolean},
	{Name: "Count", Kind: Number, Min: 1, Max: 10},
	{Name: "List", Kind: StringArray},
	{Name: "Any", Kind: Object},
	{Name: "Boot/Target", Kind: String, Min: 1, Max: 3},
}

func FuzzBody(f *testing.F) {
	for _, s := range []string{
		`{"Text":"a","Flag":true,"Count":3,"List":["x"],"Any":{"a":{}},"Boot":{"Target":"x"}}`, `{}`, `[`, `{"Text":null,"Text":1}`, `{"Count":1e99}`,
		`{"Boot":{"Target":{"x":{}}},"Oem":{"x":1}}`, `{"@odata.id":"x","Flag@odata.type":1}`, "{\"\xff\":1}", `{"Count":-0}`, `{"Boot":[]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		fields, e := parseBody(body, 10, wholeObjects(fuzzProperties))
		if (e == nil) != (fields != nil) && e != nil && fields != nil {
			t.Errorf("parseBody(%q) = %v and %v", body, fields, e)
		}
		if e == nil && !json.Valid(body) {
			t.Errorf("parseBody(%q) took what is not JSON", body)
		}
		for _, c := range []checker{{}, {action: "X.Y"}} {
			values, e := strict(c, fuzzProperties, body, 10)
			if (values == nil) == (e == nil) {
				t.Fatalf("strict(%q) = %v, %v; want one of them", body, values, e)
			}
			for name, v := range values {
				switch property(fuzzProperties, name).Kind {
				case String:
					if s, ok := v.(string); v != nil && (!ok || name == "Text" && s != "a" && s != "b" || name == "Boot/Target" && (len(s) < 1 || len(s) > 3)) {
						t.Errorf("strict(%q): %s = %#v", body, name, v)
					}
				case Number:
					if n, ok := v.(int64); !ok || n < 1 || n > 10 {
						t.Errorf("strict(%q): %s = %#v", body, name, v)
					}
				case Boolean:
					_ = v.(bool)
				case StringArray:
					_ = v.([]string)
				case Object:
					_ = v.(map[string]any)
				}
			}
		}
	})
}

// FuzzRequest sends whole requests through the service. None may fail for a reason of ours.
func FuzzRequest(f *testing.F) {
	const system = "/redfish/v1/Systems/system"
	for _, s := range [][4]string{
		{"GET", system + "?$expand=*($levels=2)", "", ""},
		{"PATCH", system, `{"Boot":{"BootSourceOverrideTarget":"Pxe"},"X":1}`, `W/"x"`},
		{"POST", system + "/Actions/ComputerSystem.Reset", `{"ResetType":"On"}`, ""},
		{"POST", sessionsURI + "/Members", `{"UserName":"root","Password":"x"}`, ""},
		{"POST", accountsURI, `{"UserName":"fuzz","Password":"a long password","RoleId":"ReadOnly"}`, ""},
		{"PATCH", accountsURI + "/1", `{"Password":"x","Locked":true}`, "*"},
		{"DELETE", accountsURI + "/1", "", `"x`},
		{"GET", system + "/LogServices/Log/Entries?$skip=3&$top=2&$select=Message", "", ""},
		{"HEAD", "/redfish/v1/$metadata", "", ""},
		{"GET", accountsURI + "?$filter=UserName%20eq%20'root'&excerpt", "", ""},
		{"POST", subscriptionsURI, `{"Destination":"https://192.0.2.1/","Protocol":"Redfish","HttpHeaders":[{"A":"b"}],"OriginResources":[{"@odata.id":"/x"}]}`, ""},
		{"PATCH", subscriptionsURI + "/1", `{"Context":null,"HttpHeaders":[]}`, "*"},
		{"POST", eventsURI + "/Actions/EventService.SubmitTestEvent", `{"MessageId":"a.1.0.b","MessageArgs":["x"]}`, ""},
		{"POST", rolesURI, `{"RoleId":"x","AssignedPrivileges":["Login"]}`, ""},
		{"POST", generateCSR, `{"CommonName":"x","CertificateCollection":{"@odata.id":"` + testHTTPS + `"}}`, ""},
		{"POST", replaceCert, `{"CertificateUri":{"@odata.id":"` + testHTTPS + `/1"},"CertificateType":"PEM","CertificateString":"x"}`, ""},
	} {
		f.Add(s[0], s[1], []byte(s[2]), s[3])
	}
	s, _ := newTestService(f, Options{})
	s.Handle(testRoutes(f)...)
	token, _ := s.sessions.open(testUser, "")
	f.Fuzz(func(t *testing.T, method, target string, body []byte, match string) {
		if !strings.HasPrefix(target, "/") || strings.Contains(target, "/LogServices/Broken") || strings.Contains(target, "/LogServices/Panic") || strings.Contains(target, streamURI) {
			t.Skip("not a request, or one that is meant to fail or not to end")
		}
		req, err := http.NewRequest(method, "https://x"+target, strings.NewReader(string(body)))
		if err != nil {
			t.Skip("net/http refuses it")
		}
		if _, ok := s.sessions.use(token); !ok {
			token, _ = s.sessions.open(testUser, "")
		}
		req.RemoteAddr = "192.0.2.1:1"
		req.Header.Set("X-Auth-Token", token)
		req.Header.Set("Content-Type", "application/json")
		if match != "" {
			req.Header.Set("If-Match", match)
			req.Header.Set("If-None-Match", match)
			req.Header.Set("Accept", match)
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		if w.Code >= 500 && w.Code != 501 {
			t.Fatalf("%s %s %q = %d %s", method, target, body, w.Code, w.Body)
		}
		if w.Code >= 400 && method != "HEAD" && !json.Valid(w.Body.Bytes()) {
			t.Fatalf("%s %s = %d, and its body is not JSON: %q", method, target, w.Code, w.Body)
		}
		if w.Header().Get("OData-Version") != "4.0" {
			t.Fatalf("%s %s: no OData-Version", method, target)
		}
	})
}
