package service

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

type closing struct {
	*bytes.Reader
	closed *int
}

func (c closing) Close() error { *c.closed++; return nil }

func TestDownload(t *testing.T) {
	s, err := New(Options{Account: &Credential{"root", "correct horse"}, Limits: Limits{Hash: HashCost{Memory: 64, Passes: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	data, closed := []byte("0123456789"), 0
	s.Handle(Route{
		URI: "/redfish/v1/Systems/system/File", Type: schema.TypeLogEntry,
		Download: func(r *Request) (*File, error) {
			if end, bounded := r.Context().Deadline(); bounded {
				t.Errorf("a download has to end by %v, however long it is", end)
			}
			return &File{Content: closing{bytes.NewReader(data), &closed}, Name: "dmesg.txt", Made: time.Unix(1e9, 0)}, nil
		},
	})
	ask := func(method string, header ...string) (*http.Response, string) {
		t.Helper()
		q := httptest.NewRequest(method, "https://x/redfish/v1/Systems/system/File", nil)
		q.SetBasicAuth("root", "correct horse")
		for i := 0; i < len(header); i += 2 {
			q.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, q)
		body, err := io.ReadAll(w.Result().Body)
		if err != nil {
			t.Fatal(err)
		}
		return w.Result(), string(body)
	}
	for _, tt := range []struct {
		method string
		header []string
		status int
		body   string
	}{
		{"GET", nil, 200, "0123456789"},
		{"GET", []string{"Accept", "application/octet-stream"}, 200, "0123456789"},
		{"GET", []string{"Range", "bytes=7-"}, 206, "789"},
		{"GET", []string{"Range", "bytes=2-3"}, 206, "23"},
		{"HEAD", nil, 200, ""},
	} {
		resp, body := ask(tt.method, tt.header...)
		if resp.StatusCode != tt.status || body != tt.body || resp.Header.Get("Cache-Control") != "no-store" ||
			resp.Header.Get("Content-Disposition") != "attachment; filename=dmesg.txt" {
			t.Errorf("%s with %q = %d %q, header %v; want %d %q", tt.method, tt.header, resp.StatusCode, body, resp.Header, tt.status, tt.body)
		}
	}
	if resp, _ := ask("GET", "Range", "bytes=70-"); resp.StatusCode != 416 {
		t.Errorf("GET behind the end = %d; want 416", resp.StatusCode)
	}
	if resp, _ := ask("GET", "Accept", "text/html"); resp.StatusCode != 406 {
		t.Errorf("GET of HTML = %d; want 406", resp.StatusCode)
	}
	if resp, _ := ask("DELETE"); resp.StatusCode != 405 {
		t.Errorf("DELETE = %d; want 405", resp.StatusCode)
	}
	if closed < 5 {
		t.Errorf("files closed %d times; want as often as they were opened", closed)
	}
}
