// Package access holds the agreement between a host's owner and its monitors, and what is permitted by it.
//
// An Agreement is a JSON document that names the host, the owner, the monitors, their rights and the time in which it is
// valid, and that the owner and every monitor have signed. Everything that it does not name is denied: the zero Grant
// permits nothing. "backdoor agreement" makes, signs, checks and shows one. A whole document:
//
//	{
//	  "version": 1,
//	  "id": "acme-web7-2026",
//	  "host": {"uuid": "1b4e28ba-2fa1-11d2-883f-0016d3cca427", "name": "web7"},
//	  "owner": {"name": "acme", "key": "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w="},
//	  "monitors": [
//	    {"name": "ops", "key": "gTl3Dqh9F19Wo1Rmw0x+zMuNipG07jelabuGvGVwnXw="}
//	  ],
//	  "rights": {"read": true, "write": true, "actions": ["kill-process", "power-cycle"], "power": true},
//	  "protected": [{"firstUID": 0, "lastUID": 0}, {"firstUID": 990, "lastUID": 999, "comm": "postgres"}],
//	  "validFrom": "2026-01-01T00:00:00Z",
//	  "validUntil": "2027-01-01T00:00:00Z",
//	  "signatures": []
//	}
//
// host.uuid is the SMBIOS system UUID, in lower case. Each of rights' actions needs write, power, or both besides, by what it
// does; power alone lets operators switch the host. rights may have "memory", a list of {"start", "size", "read", "write", "atomic"}:
// what monitors may reach of the host's memory by themselves, byte for byte; without it they may read all RAM and store nothing. Instead of
// start and size an entry can have one name: {"all": true}, {"kernelText": true}, {"symbol": "jiffies"} with or without "size", or
// {"process": {"uid": 1000, "comm": "worker"}}. The host's memory says where that is, anew at each use (see Resolver). With "twoPersons" each store by
// address needs a second operator's consent. "detectors", a list of IDs, narrows down who may judge the host; "rates", a list of
// {"action": "power-cycle", "most": 3, "within": 86400}, how often actions may be begun within so many seconds; "values", a list of
// {"action": "set-sysctl", "name": "kernel.pid_max", "min": 32768, "max": 4194304}, what those may be given that take a value: of an action that is
// named there nothing else. No action touches the tasks of protected users; init and kernel threads are
// protected always. signatures has one element for the owner, one for each monitor, and one for the host if host.key names one: {"key": …, "signature": …} in base64,
// Ed25519 over Canonical's bytes. The agent takes the document only with the key of the owner that its configuration names.
//
// What an agent has accepted it keeps in a Lock: from then on, until the agreement ends, the document can be neither widened, nor
// narrowed, nor closed by the host, by a monitor, or by whoever configures the agent. The owner can pause or revoke it at once by a
// signed Order; owner and monitors together can have a successor take its place; the keys that it names for emergencies can break the
// glass together. DESIGN.md has the threat model.
package access

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"
)

// Version is the version of the document's form that this package reads and writes.
const Version = 1

// Rights that an agreement can give, besides the actions by their IDs.
const (
	Read  = "read"  // look at the host's memory
	Write = "write" // change the host's memory at all
	Power = "power" // use the host's power controller
)

// Key is an ed25519 public key; in JSON it is base64.
type Key []byte

// MarshalText implements encoding.TextMarshaler.
func (k Key) MarshalText() ([]byte, error) {
	return []byte(base64.StdEncoding.EncodeToString(k)), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *Key) UnmarshalText(b []byte) error {
	v, err := base64.StdEncoding.Strict().DecodeString(string(b))
	if err != nil {
		return fmt.Errorf("public key is not base64: %w", err)
	}
	if len(v) != ed25519.PublicKeySize {
		return fmt.Errorf("public key has %d bytes; an ed25519 key has %d", len(v), ed25519.PublicKeySize)
	}
	*k = v
	return nil
}

// Host says which machine an agreement is about, by what does not depend on its operating system.
type Host struct {
	UUID string `json:"uuid"` // SMBIOS system UUID, RFC 9562 form, lower case
	Name string `json:"name"` // for people; not compared
	// Key is of the host's part in the agreement, if it took part: its signature is needed then. "backdoor-agree" makes the key, signs, and
	// forgets it, so that it can sign nothing afterwards; a successor need not name one.
	Key Key `json:"key,omitempty"`
}

// Party is somebody who signs.
type Party struct {
	Name string `json:"name"`
	Key  Key    `json:"key"`
}

// Rights are what the monitors may have the agent do.
type Rights struct {
	Read    bool     `json:"read"`
	Write   bool     `json:"write"`
	Actions []string `json:"actions"` // IDs of healing actions
	Power   bool     `json:"power"`
	// Memory bounds what monitors may reach of the host's memory by themselves, by RDMA. Without it they may read all RAM if Read
	// is given, and store nothing.
	Memory []Memory `json:"memory,omitempty"`
	// TwoPersons has every store by address (Memory's write and atomic) need two persons: one who asks for it, and another one who has said
	// yes. Where only one can speak, as by RDMA, nothing is stored.
	TwoPersons bool `json:"twoPersons,omitempty"`
	// Detectors are the IDs of those that may judge the host, as "panic" or "policy/miner"; without it all may.
	Detectors []string `json:"detectors,omitempty"`
	// Rates bound how often actions may be begun, whoever asks for them. An action that none names is bounded by the policy alone.
	Rates []Rate `json:"rates,omitempty"`
	// Values narrow down what actions may be given that take a value. An action that none names may be given whatever it takes by itself.
	Values []ValueRange `json:"values,omitempty"`
}

// ValueRange is a value that an action may be given.
type ValueRange struct {
	Action string `json:"action"`
	Name   string `json:"name"` // of the setting, as kernel.pid_max
	Min    int64  `json:"min"`  // both included
	Max    int64  `json:"max"`
}

// Rate is how often a healing action may be begun.
type Rate struct {
	Action string `json:"action"`
	Most   int    `json:"most"`   // times
	Within int    `json:"within"` // any so many seconds
}

// LongestRate is the most that Rate.Within may be.
const LongestRate = 7 * 24 * time.Hour

// Memory is memory of the host that monitors may reach by themselves, and how. Storing and swapping need Rights.Write besides. It is a
// physical range, Start and Size, or it has exactly one of the names. What a name stands for is asked of a Resolver at each use.
type Memory struct {
	Start  uint64 `json:"start"`
	Size   uint64 `json:"size"`
	Read   bool   `json:"read,omitempty"`
	Write  bool   `json:"write,omitempty"`
	Atomic bool   `json:"atomic,omitempty"` // compare-and-swap, fetch-and-add

	All        bool   `json:"all,omitempty"`        // all RAM
	KernelText bool   `json:"kernelText,omitempty"` // the code of the kernel's image
	Symbol     string `json:"symbol,omitempty"`     // a variable or function of the kernel's image, and Size bytes of it; zero is as far as the symbol table tells
	// Process is what is in memory of the processes of a user and name: to read what they may read, to store to what they may store to.
	Process *Process `json:"process,omitempty"`
}

// Process names processes. Both are needed: a process can choose its own name, not its user.
type Process struct {
	UID  *uint32 `json:"uid"` // effective
	Comm string  `json:"comm"`
}

// Names returns what the entry names, as people are told; empty if it is a physical range.
func (m Memory) Names() string {
	switch {
	case m.All:
		return "all RAM"
	case m.KernelText:
		return "the kernel's text"
	case m.Symbol != "" && m.Size != 0:
		return fmt.Sprintf("%#x bytes of symbol %q", m.Size, m.Symbol)
	case m.Symbol != "":
		return fmt.Sprintf("symbol %q", m.Symbol)
	case m.Process != nil && m.Process.UID != nil:
		return fmt.Sprintf("processes of user %d named %q", *m.Process.UID, m.Process.Comm)
	}
	return ""
}

// MarshalJSON implements json.Marshaler: an entry that has a name has no start, and a size only if one was given.
func (m Memory) MarshalJSON() ([]byte, error) {
	type plain Memory
	if m.Names() == "" {
		return json.Marshal(plain(m))
	}
	return json.Marshal(struct {
		Start uint64 `json:"start,omitempty"`
		Size  uint64 `json:"size,omitempty"`
		plain
	}{m.Start, m.Size, plain(m)})
}

// Protected names tasks that no action may touch. UID is required: a process can choose its own name, not its user.
type Protected struct {
	FirstUID uint32 `json:"firstUID"`
	LastUID  uint32 `json:"lastUID"`
	Comm     string `json:"comm,omitempty"` // narrows the users' tasks down to those of that name; empty means all
}

// Emergency says who may break the glass together, and what that permits besides the agreement's rights, for a time.
type Emergency struct {
	Keys      []Party  `json:"keys"`      // need not be parties; none may be named twice
	Threshold int      `json:"threshold"` // how many of them it takes; at least 2
	Actions   []string `json:"actions"`   // IDs of healing actions
	Power     bool     `json:"power"`
	Write     bool     `json:"write"`   // needs Rights.Read
	Longest   int      `json:"longest"` // seconds that one order of them lasts at the most
}

// Signature is one party's signature over the canonical bytes.
type Signature struct {
	Key       Key    `json:"key"`
	Signature []byte `json:"signature"`
}

// Agreement is the document.
type Agreement struct {
	Version    int         `json:"version"`
	ID         string      `json:"id"`
	Host       Host        `json:"host"`
	Owner      Party       `json:"owner"`
	Monitors   []Party     `json:"monitors"`
	Rights     Rights      `json:"rights"`
	Protected  []Protected `json:"protected"`
	ValidFrom  time.Time   `json:"validFrom"`
	ValidUntil time.Time   `json:"validUntil"`
	Signatures []Signature `json:"signatures"`

	// Quorum is how many of the monitors must endorse what takes the place of this agreement while it is valid, besides the
	// owner; 0 means all of them.
	Quorum int `json:"quorum,omitempty"`
	// Emergency is nil if nobody can break the glass.
	Emergency *Emergency `json:"emergency,omitempty"`
	// Succeeds is the digest, in hexadecimal, of the agreement that this one takes the place of; empty if there is none. Endorsements
	// are signatures of that agreement's monitors who are not parties to this one. They are not signed themselves.
	Succeeds     string      `json:"succeeds,omitempty"`
	Endorsements []Signature `json:"endorsements,omitempty"`
}
