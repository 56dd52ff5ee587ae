package service

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// logins checks passwords: it remembers good ones for a moment, because clients with basic authentication send theirs
// with each request, and holds off whoever fails too often.
//
// Failures are counted by user and source, and by source alone for those who try many names. So nobody can lock an administrator
// out from elsewhere, and what is not a login (an unknown path, a request without credentials) is never counted.
type logins struct {
	limits   *Limits
	accounts *accounts
	now      func() time.Time
	key      []byte        // of the cache, new at each start
	queue    chan struct{} // bounds the checks that wait for their turn
	locks    func(user, address string)

	mu     sync.Mutex // guards what follows
	good   map[[sha256.Size]byte]goodLogin
	failed map[failKey]*failures
}

type goodLogin struct {
	until      time.Time
	generation int
}

type failKey struct{ user, source string } // no user: all of the source's

// source is what failures are counted by: an IPv4 address, or the 64 bits of an IPv6 address that a single client's network has.
func source(address string) string {
	a, err := netip.ParseAddr(address)
	if err != nil || a.Unmap().Is4() {
		return address
	}
	p, err := a.WithZone("").Prefix(64)
	if err != nil {
		return address
	}
	return p.String()
}

type failures struct {
	count int
	last  time.Time
	until time.Time // locked until then
}

const (
	maxGood   = 256
	maxFailed = 1024
	// maxQueue is how many password checks may wait for their turn.
	maxQueue = 16
	// sourceFails is how many times more failures a source may have, over all names, than one name from there.
	sourceFails = 10
)

func newLogins(s *Service) *logins {
	l := &logins{limits: &s.limits, accounts: s.accounts, now: s.now, key: make([]byte, 32), queue: make(chan struct{}, maxQueue), good: map[[sha256.Size]byte]goodLogin{}, failed: map[failKey]*failures{}}
	rand.Read(l.key)
	l.locks = func(user, address string) {
		s.log.Warn("logins are held off", "user", clip(user), "from", address)
		s.keep(AuditRecord{Time: s.now(), User: clip(user), Address: address, What: "lock out", URI: sessionsURI, Status: http.StatusTooManyRequests})
	}
	return l
}

// check returns the enabled account of a user with this password.
func (l *logins) check(user, password, address string) (account, error) {
	cacheKey := l.digest(user, password)
	from := source(address)
	fails := []failKey{{user, from}, {"", from}}
	generation := l.accounts.generation()

	l.mu.Lock()
	now := l.now()
	g, hit := l.good[cacheKey]
	if hit && (now.After(g.until) || g.generation != generation) {
		delete(l.good, cacheKey)
		hit = false
	}
	var wait time.Duration
	for _, key := range fails {
		f := l.failed[key]
		if f != nil && now.Sub(f.last) > l.limits.LockTime && now.After(f.until) {
			delete(l.failed, key)
		} else if f != nil {
			wait = max(wait, f.until.Sub(now))
		}
	}
	if !hit && wait > 0 {
		l.mu.Unlock()
		return account{}, tooMany(wait)
	}
	l.mu.Unlock()

	a, ok := l.accounts.byUser(user)
	if hit && ok && a.Enabled {
		return a, nil
	}
	hash := a.Hash
	if !ok {
		hash = l.accounts.fake
	}
	select {
	case l.queue <- struct{}{}:
		defer func() { <-l.queue }()
	default:
		return account{}, tooMany(time.Second)
	}
	matches := l.accounts.matches(hash, password) && ok && a.Enabled

	l.mu.Lock()
	defer l.mu.Unlock()
	now = l.now()
	if matches {
		delete(l.failed, fails[0])
		makeRoom(l.good, maxGood)
		l.good[cacheKey] = goodLogin{until: now.Add(l.limits.CachedLogin), generation: generation}
		return a, nil
	}
	for i, key := range fails {
		f := l.failed[key]
		if f == nil {
			makeRoom(l.failed, maxFailed)
			f = &failures{}
			l.failed[key] = f
		}
		f.count++
		f.last = now
		limit := l.limits.LockAfter
		if i == 1 {
			limit *= sourceFails
		}
		if f.count >= limit {
			f.until = now.Add(l.limits.LockTime)
			f.count = 0
			go l.locks(key.user, address) // outside of mu
		}
	}
	return account{}, unauthorized()
}

// makeRoom drops an arbitrary entry of a full table.
func makeRoom[K comparable, V any](m map[K]V, limit int) {
	for k := range m {
		if len(m) < limit {
			return
		}
		delete(m, k)
	}
}

func (l *logins) digest(user, password string) (sum [sha256.Size]byte) {
	h := hmac.New(sha256.New, l.key)
	h.Write([]byte(strconv.Itoa(len(user)) + ":" + user + password))
	h.Sum(sum[:0])
	return sum
}

// locked reports whether logins of a user are held off from any address.
func (l *logins) locked(user string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	for k, f := range l.failed {
		if k.user == user && now.Before(f.until) {
			return true
		}
	}
	return false
}

// unlock forgets the failures of a user.
func (l *logins) unlock(user string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k := range l.failed {
		if k.user == user {
			delete(l.failed, k)
		}
	}
}

func unauthorized() *Error {
	e := refuse(http.StatusUnauthorized, "NoValidSession")
	e.Header = http.Header{"Www-Authenticate": {`Basic realm="Redfish", charset="UTF-8"`}}
	return e
}

func tooMany(wait time.Duration) *Error {
	seconds := strconv.Itoa(int(wait/time.Second) + 1)
	e := refuse(http.StatusTooManyRequests, "ServiceTemporarilyUnavailable", seconds)
	e.Messages[0].Message = "Too many logins have failed or are waiting. Retry in " + seconds + " seconds."
	e.Header = http.Header{"Retry-After": {seconds}}
	return e
}

// parseBasic returns the credentials in an Authorization header (RFC 7617): user and password, split at the first colon.
func parseBasic(header string) (user, password string, ok bool) {
	scheme, rest, found := strings.Cut(header, " ")
	if !found || !strings.EqualFold(scheme, "Basic") || len(rest) > 4096 {
		return "", "", false
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(rest))
	if err != nil || !utf8.Valid(raw) {
		return "", "", false
	}
	user, password, ok = strings.Cut(string(raw), ":")
	return user, password, ok && user != ""
}
