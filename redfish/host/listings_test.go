package host

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// TestListings reads each listing of a recorded kernel by Redfish, and compares it with the answer itself.
func TestListings(t *testing.T) {
	img := recordedKernel(t)
	a := newFakeAgent()
	a.image = img
	c := connect(t, a)
	var system struct {
		OEM struct {
			Ours map[string]any `json:"dev_backdoor"`
		} `json:"Oem"`
	}
	if err := c.Get(t.Context(), "/redfish/v1/Systems/system", &system); err != nil {
		t.Fatal(err)
	}
	served := listings()
	for _, l := range query.Listings() {
		if l.Served != slices.ContainsFunc(served, func(s listed) bool { return s.listing.Name == l.Name }) {
			t.Errorf("%s: served %v, which its resource does not agree with", l.Name, l.Served)
		}
		if !l.Served {
			continue
		}
		if link, _ := system.OEM.Ours[l.Resource].(map[string]any); link["@odata.id"] != client.ListingURI(l.Resource) {
			t.Errorf("the system links to %v; want %s", link, l.Resource)
		}
		want, err := l.Ask(context.Background(), img.View(t.Context()), nil)
		if err != nil {
			t.Fatal(err)
		}
		got := struct{ Answer query.Answer }{l.Empty()}
		if err := c.Get(t.Context(), client.ListingURI(l.Resource), &got); err != nil {
			t.Errorf("%s: %v", l.Name, err)
			continue
		}
		if !got.Answer.Whole().Complete || got.Answer.Whole().At.IsZero() {
			t.Errorf("%s: %+v; want it complete", l.Name, got.Answer.Whole())
		}
		if d := cmp.Diff(text(t, want), text(t, got.Answer)); d != "" {
			t.Errorf("%s: -want +got\n%s", l.Name, d)
		}
	}
}

func text(t *testing.T, a query.Answer) string {
	t.Helper()
	var b strings.Builder
	if err := a.Text(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// recordedKernel attaches to a recording of a real one.
func recordedKernel(t *testing.T) *kernel.Image {
	t.Helper()
	mem, err := hostmem.OpenImage("../../agent/kernel/testdata/6.12.hostmem")
	if err != nil {
		t.Fatal(err)
	}
	note, err := strconv.ParseUint(mem.(*hostmem.Recording).Labels()["note"], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	img, err := kernel.Open(t.Context(), mem, kernel.Options{Hint: kernel.Hint{Note: hostmem.PhysAddr(note)}, NoteOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	return img
}
