package service

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// TestOpenAPI wants every route with its methods in the document, which asks for no login, and whatever a path takes declared.
func TestOpenAPI(t *testing.T) {
	s, _ := newTestService(t, Options{})
	p := newPeer(t, listen(t, s))
	a := p.do("GET", "/redfish/v1/openapi.yaml", "", "Authorization", "")
	if a.StatusCode != 200 || !strings.HasPrefix(a.Header.Get("Content-Type"), "application/yaml") {
		t.Fatalf("GET = %s, %s", a.Status, a.Header.Get("Content-Type"))
	}
	type operation struct {
		RequestBody *struct {
			Content map[string]struct{ Schema map[string]any }
		}
		Responses map[string]any
	}
	var doc struct {
		OpenAPI string
		Paths   map[string]struct {
			Get, Post, Patch, Delete *operation
			Parameters               []struct{ Name string }
		}
	}
	if err := json.Unmarshal(a.body, &doc); err != nil || doc.OpenAPI != "3.0.1" {
		t.Fatalf("OpenAPI %q, %v", doc.OpenAPI, err)
	}
	routes := 0
	s.tree.walk(func(n *node) {
		routes++
		path := n.pattern()
		if path == "/redfish/v1" {
			path = "/redfish/v1/"
		}
		at, ok := doc.Paths[path]
		if !ok {
			t.Errorf("%s is not there", path)
			return
		}
		var methods []string
		for _, m := range []struct {
			name string
			op   *operation
		}{{"GET", at.Get}, {"POST", at.Post}, {"PATCH", at.Patch}, {"DELETE", at.Delete}} {
			if m.op != nil {
				methods = append(methods, m.name)
			}
		}
		if want := slices.DeleteFunc(n.methods(), func(m string) bool { return m == "HEAD" }); !slices.Equal(methods, want) {
			t.Errorf("%s has %q; want %q", path, methods, want)
		}
		if want := strings.Count(path, "{"); len(at.Parameters) != want {
			t.Errorf("%s declares %d parameters; want %d", path, len(at.Parameters), want)
		}
	})
	login := doc.Paths["/redfish/v1/SessionService/Sessions"].Post.RequestBody.Content["application/json"].Schema
	if required, _ := login["required"].([]any); len(required) != 2 {
		t.Errorf("a login takes %v; want UserName and Password", login)
	}
	if len(doc.Paths) < routes {
		t.Errorf("%d paths of %d routes", len(doc.Paths), routes)
	}
}
