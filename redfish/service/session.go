package service

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// session is one session. Its token is kept only as a hash: what is not there cannot leak, and a look-up by it tells nothing
// by its time.
type session struct {
	id      string
	user    string
	address string
	created time.Time
	used    time.Time
	key     [sha256.Size]byte
}

// sessions is the bounded table of sessions.
type sessions struct {
	limits *Limits
	now    func() time.Time

	mu      sync.Mutex // guards what follows
	timeout time.Duration
	byKey   map[[sha256.Size]byte]*session
	byID    map[string]*session
}

func newSessions(s *Service) *sessions {
	return &sessions{
		limits: &s.limits, now: s.now, timeout: s.limits.SessionTimeout,
		byKey: map[[sha256.Size]byte]*session{}, byID: map[string]*session{},
	}
}

// open makes a session. Where a bound is reached, the one that was idle longest goes: of the same user first.
func (t *sessions) open(user, address string) (token string, _ session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expire()
	mine := 0
	for _, s := range t.byID {
		if s.user == user {
			mine++
		}
	}
	switch {
	case mine >= t.limits.UserSessions:
		t.evict(func(s *session) bool { return s.user == user })
	case len(t.byID) >= t.limits.Sessions:
		t.evict(func(*session) bool { return true })
	}
	var secret [32]byte
	rand.Read(secret[:])
	token = hex.EncodeToString(secret[:])
	now := t.now()
	s := &session{id: randomText(9), user: user, address: address, created: now, used: now, key: sha256.Sum256([]byte(token))}
	t.byKey[s.key], t.byID[s.id] = s, s
	return token, *s
}

func (t *sessions) evict(f func(*session) bool) {
	var oldest *session
	for _, s := range t.byID {
		if f(s) && (oldest == nil || s.used.Before(oldest.used)) {
			oldest = s
		}
	}
	if oldest != nil {
		t.drop(oldest)
	}
}

func (t *sessions) drop(s *session) {
	delete(t.byKey, s.key)
	delete(t.byID, s.id)
}

// expire ends the sessions whose time is up. The caller holds mu.
func (t *sessions) expire() {
	now := t.now()
	for _, s := range t.byID {
		if now.Sub(s.used) > t.timeout {
			t.drop(s)
		}
	}
}

// use returns the session of a token, and counts as a sign of life.
func (t *sessions) use(token string) (session, bool) {
	key := sha256.Sum256([]byte(token))
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byKey[key]
	if s == nil {
		return session{}, false
	}
	now := t.now()
	if now.Sub(s.used) > t.timeout {
		t.drop(s)
		return session{}, false
	}
	s.used = now
	return *s, true
}

// get returns the session with an Id.
func (t *sessions) get(id string) (session, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expire()
	if s := t.byID[id]; s != nil {
		return *s, true
	}
	return session{}, false
}

// list returns all sessions, the oldest first.
func (t *sessions) list() []session {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expire()
	all := make([]session, 0, len(t.byID))
	for _, s := range t.byID {
		all = append(all, *s)
	}
	slices.SortFunc(all, func(a, b session) int {
		if c := a.created.Compare(b.created); c != 0 {
			return c
		}
		return strings.Compare(a.id, b.id)
	})
	return all
}

// end ends a session.
func (t *sessions) end(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byID[id]
	if s == nil {
		return false
	}
	t.drop(s)
	return true
}

// endUser ends all sessions of a user but one.
func (t *sessions) endUser(user, except string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.byID {
		if s.user == user && s.id != except {
			t.drop(s)
		}
	}
}

func (t *sessions) timeoutNow() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.timeout
}

func (t *sessions) setTimeout(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.timeout = d
}

const sessionsURI = "/redfish/v1/SessionService/Sessions"

func (s *Service) sessionRoutes() []Route {
	view := func(c session) *schema.Session {
		out := &schema.Session{
			Resource: schema.Resource{ID: c.id, Name: "User Session"}, UserName: c.user, ClientOriginIPAddress: c.address,
			CreatedTime: schema.Time(c.created), SessionType: "Redfish",
		}
		if a, ok := s.accounts.byUser(c.user); ok {
			out.Roles = []string{a.Role}
		}
		return out
	}
	return []Route{
		{
			URI:  "/redfish/v1/SessionService",
			Type: schema.TypeSessionService,
			Get: func(*Request) (schema.Object, error) {
				return &schema.SessionService{
					Resource: schema.Resource{Name: "Session Service"}, ServiceEnabled: true,
					SessionTimeout: int(s.sessions.timeoutNow().Seconds()),
					Status:         &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
					Sessions:       schema.LinkTo(sessionsURI),
				}, nil
			},
			Patch: &Patch{
				Properties: []Property{{Name: "SessionTimeout", Kind: Number, Min: 30, Max: 86400}},
				Do: func(_ *Request, v Values) error {
					s.sessions.setTimeout(time.Duration(v.Int("SessionTimeout")) * time.Second)
					return nil
				},
			},
		},
		{
			URI: sessionsURI, Type: schema.TypeSessionCollection, Name: "Sessions",
			Members: func(r *Request) (ids []string, err error) {
				for _, c := range s.sessions.list() {
					if c.user == r.Caller.User || r.Caller.may(ConfigureManager) {
						ids = append(ids, c.id)
					}
				}
				return ids, nil
			},
			Create: &Create{
				Open:       true,
				Properties: []Property{{Name: "UserName", Kind: String, Required: true, Max: 256}, {Name: "Password", Kind: String, Required: true, Max: 1024}},
				Do: func(r *Request, v Values) (string, *Reply, error) {
					user := v.String("UserName")
					a, err := s.logins.check(user, v.String("Password"), r.Caller.Address)
					if err != nil {
						return "", nil, err
					}
					r.Caller.User = user
					token, c := s.sessions.open(user, r.Caller.Address)
					out := view(c)
					if a.Change {
						out.ExtendedInfo = []schema.Message{message("PasswordChangeRequired", accountsURI+"/"+a.ID)}
					}
					return c.id, &Reply{Body: out, Header: http.Header{"X-Auth-Token": {token}}}, nil
				},
			},
		},
		{
			URI: sessionsURI + "/{session}", Type: schema.TypeSession,
			Get: func(r *Request) (schema.Object, error) {
				c, ok := s.sessions.get(r.Param("session"))
				if !ok {
					return nil, ErrNotFound
				}
				return view(c), nil
			},
			Delete: func(r *Request) error {
				if !s.sessions.end(r.Param("session")) {
					return ErrNotFound
				}
				return nil
			},
		},
	}
}

// own reports whether a resource is the caller's own account, session or subscription.
func (s *Service) own(r *Request) bool {
	if r.node == nil || r.node.route == nil {
		return false
	}
	switch r.node.route.entity() {
	case "ManagerAccount":
		c, ok := s.accounts.get(r.Param("account"))
		return ok && c.User == r.Caller.User
	case "Session":
		c, ok := s.sessions.get(r.Param("session"))
		return ok && c.user == r.Caller.User
	case "EventDestination":
		c, ok := s.subs.get(r.Param("subscription"))
		return ok && c.User == r.Caller.User
	}
	return false
}

func (c Caller) may(privilege string) bool { return slices.Contains(c.privileges, privilege) }
