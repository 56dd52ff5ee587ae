package host

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

func TestRelayed(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f := &detect.Finding{ID: "f-1", Kind: detect.KindPanic, Title: "Panic", Detail: "it broke", Severity: detect.Critical}
	for _, tc := range []struct {
		in   engine.Event
		want service.Event
	}{
		{
			engine.Event{Type: engine.EventFinding, At: at, Text: "x", Finding: f},
			service.Event{MessageID: "BackdoorHost.1.0.Panic", Args: []string{"Panic", "it broke"}, Message: "Panic: it broke", Severity: "Critical", Origin: systemURI, LogEntry: findingsURI + "/f-1", Time: at},
		},
		{
			engine.Event{Type: engine.EventHealed, At: at, Text: "it works again", Finding: f},
			service.Event{MessageID: "BackdoorHost.1.0.Repaired", Args: []string{"it works again"}, Message: "it works again", Severity: "OK", Origin: systemURI, LogEntry: findingsURI + "/f-1", Time: at},
		},
		{
			engine.Event{Type: engine.EventLost, At: at, Text: "gone"},
			service.Event{MessageID: "BackdoorHost.1.0.Lost", Args: []string{"gone"}, Message: "gone", Severity: "Warning", Origin: systemURI, Time: at},
		},
	} {
		got, ok := relayed(tc.in)
		if !ok {
			t.Errorf("%s is not relayed", tc.in.Type)
		}
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", tc.in.Type, d)
		}
	}
	if _, ok := relayed(engine.Event{Type: engine.EventSuspicion}); ok {
		t.Error("a suspicion is relayed")
	}
	for kind, m := range eventNames {
		if _, ok := registry.Messages[m.name]; !ok && kind != engine.EventFinding {
			t.Errorf("the registry has no message %s for %s", m.name, kind)
		}
	}
}

func TestRelay(t *testing.T) {
	s := newTestService(t, newFakeAgent(), service.Options{})
	events := make(chan engine.Event, 1)
	events <- engine.Event{Type: engine.EventAttached, Text: "attached"}
	close(events)
	if err := Relay(t.Context(), s, events); err != nil {
		t.Errorf("Relay = %v", err)
	}
}

func TestConditions(t *testing.T) {
	a := newFakeAgent()
	resolved := time.Now()
	a.findings = append(a.findings, detect.Finding{ID: "s", Suspicion: true}, detect.Finding{ID: "r", Resolved: &resolved})
	all := Conditions(a.Findings)(nil)
	open := 0
	for _, f := range a.findings {
		if !f.Suspicion && f.Resolved == nil {
			open++
		}
	}
	if len(all) != open || open == 0 || all[0].LogEntry == nil || all[0].Severity == "" {
		t.Errorf("%d conditions %+v; want one for each of %d open findings", len(all), all, open)
	}
}

// keeper is a journal that keeps kinds only.
type keeper struct {
	kinds []string
	err   error
}

func (k *keeper) Write(kind string, _ any) (uint64, error) {
	k.kinds = append(k.kinds, kind)
	return uint64(len(k.kinds)), k.err
}

func TestAuditTrail(t *testing.T) {
	k := &keeper{}
	if err := Audit(k)(service.AuditRecord{What: "PATCH"}); err != nil || len(k.kinds) != 1 || k.kinds[0] != "audit" {
		t.Errorf("Audit = %v, kept %q", err, k.kinds)
	}
	k.err = errors.New("full")
	if err := Audit(k)(service.AuditRecord{}); !errors.Is(err, k.err) {
		t.Errorf("Audit with a full journal = %v", err)
	}
}

func TestHealWantsPrivilege(t *testing.T) {
	s := newTestService(t, newFakeAgent(), service.Options{})
	post := func(user, password, uri, body string) int {
		r := httptest.NewRequest("POST", "https://x"+uri, strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		r.SetBasicAuth(user, password)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		return w.Code
	}
	const accounts, password = "/redfish/v1/AccountService", "a long password"
	for uri, body := range map[string]string{
		"/Roles": `{"RoleId":"Power","AssignedPrivileges":["Login","ConfigureComponents"]}`, "/Accounts": `{"UserName":"operator","Password":"a long password","RoleId":"Operator"}`,
	} {
		if got := post(testUser, testPassword, accounts+uri, body); got != 201 {
			t.Fatalf("POST %s = %d", uri, got)
		}
	}
	if got := post(testUser, testPassword, accounts+"/Accounts", `{"UserName":"power","Password":"a long password","RoleId":"Power"}`); got != 201 {
		t.Fatalf("POST = %d", got)
	}
	const action = systemURI + "/Actions/Oem/BackdoorComputerSystem.Heal"
	for user, want := range map[string]int{"power": 403, "operator": 404} { // the finding is not there
		if got := post(user, password, action, `{"Finding":"none"}`); got != want {
			t.Errorf("Heal by %s = %d; want %d", user, got, want)
		}
	}
}
