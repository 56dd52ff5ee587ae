package export

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// ServicePort is the port in the RDMA port space of TCP on which the agent takes connection requests.
const ServicePort = 4791

// KeySize is the length of a key's secret in bytes.
const KeySize = 32

// Key lets a monitor prove that it speaks for a user, when there is no Redfish: both sides have the secret.
type Key struct {
	User   string
	Secret [KeySize]byte
}

// ParseKey reads a secret: 32 bytes in base64.
func ParseKey(user, secret string) (Key, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(secret)
	if err != nil || len(b) != KeySize {
		return Key{}, fmt.Errorf("key of %q: want %d bytes in base64", user, KeySize)
	}
	return Key{user, [KeySize]byte(b)}, nil
}

type keyID [8]byte

func (k Key) id() (id keyID) {
	sum := sha256.Sum256(append([]byte("backdoor rdma key id v1\n"), k.Secret[:]...))
	copy(id[:], sum[:])
	return id
}

// A token is the 56 bytes of private data of a connection request: version 1, kind, rights (1 write, 2 atomic), reserved, key Id
// 8, time in ns since 1970 8, start 8, length 8, and the first 20 bytes of HMAC-SHA256 with the key's secret over a constant, the
// 36 bytes so far, and the addresses of the monitor and of the agent as 16 bytes each; numbers are little endian.
//
// The time may be off by tokenSpan and counts once, so a token that was seen on the wire is of no use to anybody else.
const (
	tokenLen  = 56
	tokenBody = 36
	tokenSpan = 2 * time.Minute
	maxTokens = 4096 // that were used within the span
)

func (k Key) token(now time.Time, r Request, monitor, agent netip.Addr) []byte {
	b := []byte{1, byte(r.Kind), 0, 0}
	if r.Write {
		b[2] |= 1
	}
	if r.Atomic {
		b[2] |= 2
	}
	id := k.id()
	b = append(b, id[:]...)
	le := binary.LittleEndian
	b = le.AppendUint64(b, uint64(now.UnixNano()))
	b = le.AppendUint64(b, r.Start)
	b = le.AppendUint64(b, r.Length)
	return append(b, k.mac(b, monitor, agent)...)
}

func (k Key) mac(body []byte, monitor, agent netip.Addr) []byte {
	h := hmac.New(sha256.New, k.Secret[:])
	h.Write([]byte("backdoor rdma token v1\n"))
	h.Write(body)
	for _, a := range []netip.Addr{monitor, agent} {
		b := a.Unmap().As16()
		h.Write(b[:])
	}
	return h.Sum(nil)[:tokenLen-tokenBody]
}

// tokens checks tokens.
type tokens struct {
	keys map[keyID]Key

	mu   sync.Mutex
	used map[usedToken]bool // guarded by mu
}

type usedToken struct {
	key keyID
	at  int64
}

func newTokens(keys []Key) *tokens {
	t := &tokens{keys: map[keyID]Key{}, used: map[usedToken]bool{}}
	for _, k := range keys {
		t.keys[k.id()] = k
	}
	return t
}

var errToken = errors.New("no token of a known key")

// check returns what a token asks for and for whom.
func (t *tokens) check(now time.Time, b []byte, monitor, agent netip.Addr) (Request, error) {
	if len(b) < tokenLen || b[0] != 1 || b[2] > 3 || b[3] != 0 {
		return Request{}, errToken
	}
	body := b[:tokenBody]
	id := keyID(b[4:12])
	k, ok := t.keys[id]
	if !ok || !hmac.Equal(b[tokenBody:tokenLen], k.mac(body, monitor, agent)) {
		return Request{}, errToken
	}
	le := binary.LittleEndian
	at := int64(le.Uint64(b[12:]))
	if d := now.Sub(time.Unix(0, at)); d > tokenSpan || d < -tokenSpan {
		return Request{}, fmt.Errorf("token of %s is %v old", k.User, d)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for u := range t.used {
		if now.Sub(time.Unix(0, u.at)) > tokenSpan {
			delete(t.used, u)
		}
	}
	u := usedToken{id, at}
	if t.used[u] || len(t.used) >= maxTokens {
		return Request{}, fmt.Errorf("token of %s was used before, or too many were", k.User)
	}
	t.used[u] = true
	return Request{
		User: k.User, Kind: Kind(b[1]), Write: b[2]&1 != 0, Atomic: b[2]&2 != 0, Start: le.Uint64(b[20:]), Length: le.Uint64(b[28:]),
	}, nil
}
