package client

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

func TestEvents(t *testing.T) {
	s, _, url := start(t, service.Options{})
	c := newClient(t, Config{URL: url, User: user, Password: password, Insecure: true})
	enough := errors.New("enough")
	test := service.Event{MessageID: "ResourceEvent.1.4.TestMessage"}
	var seen []schema.Event
	follow := func(after string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		return c.Events(ctx, EventOptions{Filter: "MessageId eq 'ResourceEvent.TestMessage'", After: after}, func(e schema.Event) error {
			seen = append(seen, e)
			if len(seen) == 3 {
				return enough
			}
			return nil
		})
	}
	for i := range 4 {
		test.Group = int64(i + 1)
		s.Publish(test)
	}
	// "x-1" is of another start of the service: all that there is comes.
	if err := follow("x-1"); !errors.Is(err, enough) || seen[0].Events[0].EventGroupID != 1 || seen[2].Events[0].EventGroupID != 3 {
		t.Fatalf("Events = %v, %+v", err, seen)
	}
	after := seen[2].ID
	seen = seen[:2]
	if err := follow(after); !errors.Is(err, enough) || seen[2].Events[0].EventGroupID != 4 {
		t.Errorf("Events behind %s = %v, %+v", after, err, seen)
	}
	err := c.Events(t.Context(), EventOptions{Filter: "nonsense"}, nil)
	var refused *Error
	if !errors.As(err, &refused) || refused.Status != 400 {
		t.Errorf("Events with a bad filter = %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := c.Events(ctx, EventOptions{}, func(schema.Event) error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Events until a deadline = %v", err)
	}
}

func TestReadStream(t *testing.T) {
	const stream = ": hello\n\nid: a-1\ndata: {\"Id\":\"a-1\",\ndata: \"Name\":\"Event\"}\n\nretry: 5\ndata: {\"Id\":\"x\"}\n\n"
	var ids []string
	err := readStream(strings.NewReader(stream), func() {}, func(id string, e schema.Event) error {
		ids = append(ids, id+"="+e.ID)
		return nil
	})
	if err == nil || strings.Join(ids, " ") != "a-1=a-1 a-1=x" {
		t.Errorf("readStream = %q, %v", ids, err)
	}
}

func FuzzReadStream(f *testing.F) {
	f.Add([]byte("id: 1\ndata: {\"Id\":\"1\"}\n\n"))
	f.Add([]byte("data\n\ndata:[\n\n: x\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := readStream(strings.NewReader(string(b)), func() {}, func(string, schema.Event) error { return nil }); err == nil {
			t.Error("a stream never ends well")
		}
	})
}
