package service

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// clock is a clock that tests move.
type clock struct {
	mu sync.Mutex // guards t
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) forward(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// setClock gives a service that does not serve yet another clock.
func setClock(s *Service) *clock {
	c := &clock{t: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	s.now, s.sessions.now, s.logins.now = c.now, c.now, c.now
	return c
}

func TestFirstPassword(t *testing.T) {
	dir := t.TempDir()
	var announced []Credential
	o := Options{StateDir: dir, Announce: func(c Credential) { announced = append(announced, c) }}
	if _, err := New(Options{StateDir: dir, Announce: o.Announce, Limits: Limits{Hash: cheap}}); err != nil {
		t.Fatal(err)
	}
	// A second start before the password was changed makes a new one: the first may never have been seen.
	s, _ := newTestService(t, o)
	if len(announced) != 2 || announced[0] == announced[1] || announced[1].User != "admin" || len(announced[1].Password) < 16 {
		t.Fatalf("announced %v; want two different passwords of admin", announced)
	}
	first := announced[1].Password
	p := newPeer(t, listen(t, s))
	if a := p.do("GET", "/redfish/v1/Systems", "", "Authorization", basic("admin", announced[0].Password)); a.StatusCode != 401 {
		t.Errorf("the password of the first start = %d; want 401", a.StatusCode)
	}

	// The four rules of DSP0266 about an account whose password must be changed.
	login := p.do("POST", sessionsURI, fmt.Sprintf(`{"UserName":"admin","Password":%q}`, first), "Authorization", "")
	if login.StatusCode != 201 || !strings.HasSuffix(fmt.Sprint(login.at("@Message.ExtendedInfo", 0, "MessageId")), ".PasswordChangeRequired") {
		t.Fatalf("login = %d %s; want 201 with PasswordChangeRequired", login.StatusCode, login.body)
	}
	auth := []string{"Authorization", "", "X-Auth-Token", login.Header.Get("X-Auth-Token")}
	account := fmt.Sprint(login.at("@Message.ExtendedInfo", 0, "MessageArgs", 0))
	if a := p.do("GET", account, "", auth...); a.StatusCode != 200 || a.at("PasswordChangeRequired") != true {
		t.Errorf("GET own account = %d", a.StatusCode)
	}
	for _, tc := range []struct{ method, path, body string }{
		{"GET", "/redfish/v1/Systems", ""},
		{"GET", "/redfish/v1/AccountService/Roles/Administrator", ""},
		{"POST", "/redfish/v1/Systems/system/Actions/ComputerSystem.Reset", `{"ResetType":"ForceOff"}`},
		{"PATCH", account, `{"PasswordChangeRequired":false}`},
		{"PATCH", account, `{"Password":"a new password","UserName":"me"}`},
		{"DELETE", account, ""},
		{"POST", accountsURI, `{"UserName":"other","Password":"a new password","RoleId":"Administrator"}`},
	} {
		if a := p.do(tc.method, tc.path, tc.body, auth...); a.StatusCode != 403 || a.messageID() != "PasswordChangeRequired" {
			t.Errorf("%s %s %s = %d %s; want 403 PasswordChangeRequired", tc.method, tc.path, tc.body, a.StatusCode, a.messageID())
		}
	}
	for body, want := range map[string]string{
		`{"Password":"short"}`:                            "PasswordIncorrectLength",
		fmt.Sprintf(`{"Password":%q}`, first):             "PasswordComplexityNotMet",
		`{"Password":1}`:                                  "PropertyValueTypeError",
		`{"Password":null}`:                               "PropertyValueTypeError",
		`{"Password":"` + strings.Repeat("x", 200) + `"}`: "PasswordIncorrectLength",
	} {
		a := p.do("PATCH", account, body, auth...)
		if a.StatusCode != 400 || a.messageID() != want {
			t.Errorf("PATCH %s = %d %s; want 400 %s", body, a.StatusCode, a.messageID(), want)
		}
		if strings.Contains(string(a.body), "short") || strings.Contains(string(a.body), first) {
			t.Errorf("the answer repeats the password: %s", a.body)
		}
	}
	if a := p.do("PATCH", account, `{"Password":"a new password"}`, auth...); a.StatusCode != 200 || a.at("PasswordChangeRequired") != false || a.at("Password") != nil {
		t.Fatalf("change of password = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("GET", "/redfish/v1/Systems", "", auth...); a.StatusCode != 200 {
		t.Errorf("after the change, with the same session = %d", a.StatusCode)
	}

	// The change outlives the service, and nothing is announced any more.
	again, _ := newTestService(t, o)
	if len(announced) != 2 {
		t.Errorf("announced %v after the change", announced[2:])
	}
	p = newPeer(t, listen(t, again))
	for password, want := range map[string]int{"a new password": 200, first: 401} {
		if a := p.do("GET", "/redfish/v1/Systems", "", "Authorization", basic("admin", password)); a.StatusCode != want {
			t.Errorf("after a restart, %q = %d; want %d", password, a.StatusCode, want)
		}
	}
	stored, err := os.ReadFile(filepath.Join(dir, "accounts.json"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(stored), "a new password") || !strings.Contains(string(stored), "$argon2id$") {
		t.Errorf("stored: %s", stored)
	}
	for _, name := range []string{"accounts.json", "tls.pem"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v; want 0600", name, info.Mode(), err)
		}
	}
	if again.UUID() != s.UUID() || !again.Certificate().Equal(s.Certificate()) {
		t.Error("UUID or certificate changed with the restart")
	}
}

func TestDamagedState(t *testing.T) {
	for name, content := range map[string]string{
		"accounts.json": `{"version":1,`,
		"tls.pem":       "nonsense",
	} {
		dir := t.TempDir()
		if _, err := New(Options{StateDir: dir, Limits: Limits{Hash: cheap}}); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Options{StateDir: dir, Limits: Limits{Hash: cheap}}); err == nil {
			t.Errorf("New with a damaged %s succeeded", name)
		}
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "accounts.json")
	for _, content := range []string{`{"version":2,"next":1,"accounts":[]}`, `{"version":1,"next":1,"accounts":[],"more":1}`} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Options{StateDir: dir, Limits: Limits{Hash: cheap}}); err == nil {
			t.Errorf("New with accounts %s succeeded", content)
		}
	}
}

func TestAccounts(t *testing.T) {
	_, p, _ := newTree(t, Options{})
	create := func(user, role string) string {
		t.Helper()
		a := p.do("POST", accountsURI+"/Members", fmt.Sprintf(`{"UserName":%q,"Password":"a long password","RoleId":%q}`, user, role))
		if a.StatusCode != 201 || a.Header.Get("ETag") == "" {
			t.Fatalf("create %s = %d %s", user, a.StatusCode, a.body)
		}
		return a.Header.Get("Location")
	}
	operator, reader := create("operator", "Operator"), create("reader", "ReadOnly")
	as := func(user string) []string { return []string{"Authorization", basic(user, "a long password")} }
	const reset = "/redfish/v1/Systems/system/Actions/ComputerSystem.Reset"

	for _, tc := range []struct {
		user, method, path, body string
		want                     int
	}{
		{"reader", "GET", "/redfish/v1/Systems/system", "", 200},
		{"reader", "POST", reset, `{"ResetType":"On"}`, 403},
		{"operator", "POST", reset, `{"ResetType":"On"}`, 204},
		{"reader", "PATCH", "/redfish/v1/Systems/system", `{"Boot":{"BootSourceOverrideTarget":"Pxe"}}`, 403},
		{"operator", "PATCH", "/redfish/v1/Systems/system", `{"Boot":{"BootSourceOverrideTarget":"Pxe"}}`, 200},
		{"operator", "POST", "/redfish/v1/Managers/bmc/Actions/Manager.Reset", `{}`, 403},
		{"operator", "PATCH", "/redfish/v1/SessionService", `{"SessionTimeout":600}`, 403},
		{"operator", "POST", accountsURI, `{"UserName":"x","Password":"a long password","RoleId":"Administrator"}`, 403},
		{"reader", "GET", operator, "", 403},
		{"reader", "GET", reader, "", 200},
		{"reader", "PATCH", operator, `{"Password":"another password"}`, 403},
		{"reader", "PATCH", reader, `{"RoleId":"Administrator"}`, 403},
		{"reader", "PATCH", reader, `{"Enabled":true}`, 403},
		{"reader", "DELETE", reader, "", 403},
		// ClearLog is ConfigureComponents below a system, where below a manager it is ConfigureManager.
		{"operator", "POST", "/redfish/v1/Systems/system/LogServices/Log/Actions/LogService.ClearLog", "", 204},
		{"reader", "POST", "/redfish/v1/Systems/system/LogServices/Log/Actions/LogService.ClearLog", "", 403},
	} {
		if a := p.do(tc.method, tc.path, tc.body, as(tc.user)...); a.StatusCode != tc.want {
			t.Errorf("%s: %s %s %s = %d %s; want %d", tc.user, tc.method, tc.path, tc.body, a.StatusCode, a.messageID(), tc.want)
		}
	}
	if a := p.do("GET", accountsURI, "", as("reader")...); a.at("Members@odata.count") != 1.0 {
		t.Errorf("a reader sees %v accounts; want its own", a.at("Members@odata.count"))
	}

	// Mixed: the password may be changed, the role may not.
	a := p.do("PATCH", reader, `{"Password":"another password","RoleId":"Administrator"}`, as("reader")...)
	if a.StatusCode != 200 || a.at("RoleId") != "ReadOnly" || a.at("@Message.ExtendedInfo", 0, "RelatedProperties", 0) != "#/RoleId" {
		t.Errorf("mixed PATCH = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("GET", reader, "", as("reader")...); a.StatusCode != 401 {
		t.Errorf("the old password, cached a moment ago = %d; want 401", a.StatusCode)
	}

	for body, want := range map[string]string{
		`{"UserName":"operator","Password":"a long password","RoleId":"ReadOnly"}`:  "ResourceAlreadyExists",
		`{"UserName":"new","Password":"a long password","RoleId":"King"}`:           "PropertyValueNotInList",
		`{"UserName":"new","Password":"a long password"}`:                           "CreateFailedMissingReqProperties",
		`{"UserName":"a b","Password":"a long password","RoleId":"ReadOnly"}`:       "PropertyValueFormatError",
		`{"UserName":"longpassword","Password":"longpassword","RoleId":"ReadOnly"}`: "PasswordComplexityNotMet",
		`{"UserName":"new","Password":"a long password","RoleId":"ReadOnly","X":1}`: "PropertyUnknown",
	} {
		if a := p.do("POST", accountsURI, body); a.StatusCode != 400 || a.messageID() != want {
			t.Errorf("POST %s = %d %s; want 400 %s", body, a.StatusCode, a.messageID(), want)
		}
	}

	own := accountsURI + "/1"
	for _, tc := range []struct{ method, body string }{{"DELETE", ""}, {"PATCH", `{"Enabled":false}`}, {"PATCH", `{"RoleId":"Operator"}`}} {
		if a := p.do(tc.method, own, tc.body); a.StatusCode != 400 {
			t.Errorf("%s %s of the last administrator = %d; want 400", tc.method, tc.body, a.StatusCode)
		}
	}
	if a := p.do("PATCH", operator, `{"Enabled":false}`); a.StatusCode != 200 {
		t.Errorf("disable = %d", a.StatusCode)
	}
	if a := p.do("GET", "/redfish/v1/Systems", "", as("operator")...); a.StatusCode != 401 {
		t.Errorf("a disabled account = %d; want 401", a.StatusCode)
	}
	if a := p.do("DELETE", operator, ""); a.StatusCode != 204 {
		t.Errorf("DELETE = %d", a.StatusCode)
	}
	if a := p.do("GET", operator, ""); a.StatusCode != 404 {
		t.Errorf("GET of a deleted account = %d", a.StatusCode)
	}
	if next := create("later", "ReadOnly"); next == operator {
		t.Errorf("the Id of a deleted account is used again: %s", next)
	}
}

func TestSessions(t *testing.T) {
	s, _ := newTestService(t, Options{Limits: Limits{Sessions: 4, UserSessions: 3}})
	now := setClock(s)
	p := newPeer(t, listen(t, s))
	login := func() (token, uri string) {
		t.Helper()
		now.forward(time.Second)
		a := p.do("POST", sessionsURI, fmt.Sprintf(`{"UserName":%q,"Password":%q}`, testUser, testPassword), "Authorization", "")
		if a.StatusCode != 201 || a.at("Password") != nil || a.at("@odata.id") != a.Header.Get("Location") {
			t.Fatalf("login = %d %s", a.StatusCode, a.body)
		}
		return a.Header.Get("X-Auth-Token"), a.Header.Get("Location")
	}
	get := func(token string) int {
		return p.do("GET", "/redfish/v1/Systems", "", "Authorization", "", "X-Auth-Token", token).StatusCode
	}
	t1, u1 := login()
	t2, _ := login()
	t3, _ := login()
	if get(t1) != 200 || get(t2) != 200 || get(t3) != 200 {
		t.Fatal("three sessions do not work")
	}
	now.forward(time.Minute)
	get(t1)
	now.forward(time.Second)
	get(t3)
	t4, _ := login() // t2 has been idle longest
	if got := [4]int{get(t1), get(t2), get(t3), get(t4)}; got != [4]int{200, 401, 200, 200} {
		t.Errorf("after a fourth session of three: %v; want the second gone", got)
	}
	if a := p.do("DELETE", u1, "", "Authorization", "", "X-Auth-Token", t4); a.StatusCode != 204 {
		t.Errorf("DELETE of another own session = %d", a.StatusCode)
	}
	if get(t1) != 401 {
		t.Error("a deleted session still works")
	}
	if a := p.do("DELETE", u1, ""); a.StatusCode != 404 {
		t.Errorf("DELETE of a deleted session = %d; want 404", a.StatusCode)
	}
	now.forward(s.limits.SessionTimeout + time.Second)
	if get(t4) != 401 {
		t.Error("an idle session still works")
	}
	if a := p.do("GET", sessionsURI, ""); a.at("Members@odata.count") != 0.0 {
		t.Errorf("sessions left: %s", a.body)
	}
	for body, want := range map[string]int{
		`{"UserName":"root","Password":"wrong"}`: 401,
		`{"UserName":"root"}`:                    400,
		`{"UserName":1,"Password":"x"}`:          400,
		`{`:                                      400,
		`{"UserName":"` + strings.Repeat("x", 5000) + `","Password":"x"}`: 413,
	} {
		if a := p.do("POST", sessionsURI, body, "Authorization", ""); a.StatusCode != want {
			t.Errorf("login with %.40s = %d; want %d", body, a.StatusCode, want)
		}
	}
}

func TestLockout(t *testing.T) {
	s, _ := newTestService(t, Options{})
	now := setClock(s)
	url := listen(t, s)
	p := newPeer(t, url)
	get := func(password string) answer {
		return p.do("GET", "/redfish/v1/Systems", "", "Authorization", basic(testUser, password))
	}
	// Neither junk paths nor requests without credentials count.
	for range 20 {
		p.do("GET", "/redfish/v1/Nonsense", "", "Authorization", basic(testUser, "wrong"))
		p.do("GET", "/redfish/v1/Systems", "", "Authorization", "")
		p.do("GET", "/redfish/v1/Systems", "", "Authorization", "", "X-Auth-Token", "wrong")
	}
	if a := get(testPassword); a.StatusCode != 200 {
		t.Fatalf("after junk = %d; want 200", a.StatusCode)
	}
	for i := range 5 {
		if a := get("wrong"); a.StatusCode != 401 {
			t.Fatalf("wrong password %d = %d; want 401", i, a.StatusCode)
		}
	}
	a := get("wrong")
	if a.StatusCode != http.StatusTooManyRequests || a.Header.Get("Retry-After") == "" {
		t.Errorf("after five = %d, Retry-After %q; want 429", a.StatusCode, a.Header.Get("Retry-After"))
	}
	if a := get(testPassword); a.StatusCode != 200 {
		t.Errorf("somebody whose password was checked before the attack = %d; want 200", a.StatusCode)
	}
	now.forward(2 * time.Minute) // the remembered login is over, and the lock too
	for range 6 {
		get("wrong")
	}
	if a := get(testPassword); a.StatusCode != 429 {
		t.Errorf("the right password from the same address, not remembered = %d; want 429", a.StatusCode)
	}
	if _, err := s.logins.check(testUser, testPassword, "192.0.2.1"); err != nil {
		t.Errorf("from another address: %v; want nobody locked out by strangers", err)
	}
	if !s.logins.locked(testUser) {
		t.Error("Locked is not shown")
	}
	now.forward(time.Minute)
	if a := get(testPassword); a.StatusCode != 200 {
		t.Errorf("a minute later = %d; want 200", a.StatusCode)
	}
}

func TestLoginTablesAreBounded(t *testing.T) {
	s, _ := newTestService(t, Options{})
	for i := range 3000 {
		user := fmt.Sprint("user", i)
		if _, err := s.logins.check(user, "wrong", "192.0.2.1"); err == nil {
			t.Fatal("logged in")
		}
	}
	if n := len(s.logins.failed); n > maxFailed {
		t.Errorf("%d failures are remembered; want at most %d", n, maxFailed)
	}
}
