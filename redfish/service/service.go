// Package service is a generic Redfish service over a tree of resources.
//
// A product declares its resources as Routes, plain values with whole URIs; the package does once, for all of them, what the
// Redfish specification (DSP0266 1.23) asks of every resource: routing, methods, ETags and preconditions, query options,
// checks of request bodies with extended errors, privileges from DMTF's registry, sessions, accounts, tasks, metadata. It
// serves HTTPS only and knows nothing of agents: the lab's baseboard management controller runs on it too (see BMC).
package service

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Options tune a Service. The zero value makes a service without memory: all its state is lost with the process.
type Options struct {
	Logger *slog.Logger
	// StateDir keeps the accounts, the TLS key and certificate and the service's UUID. It is made if absent, with mode 0700.
	StateDir string
	// Product and Vendor are told in the service root.
	Product, Vendor string
	// Account is the administrator that is made if there are no accounts yet, with its password as it is. It is for labs
	// and tests. If nil, the administrator "admin" gets a random password that must be changed at the first login.
	Account *Credential
	// Announce is called with the random password, each time that New makes one: at the first start and at every start until
	// the password was changed, for only its hash is kept. It belongs on a console that only the owner sees.
	Announce func(Credential)
	// Names are the DNS names and IP addresses that the self-signed certificate is made for, beside localhost and loopback.
	Names []string
	// Certificate is used instead of a self-signed one.
	Certificate *tls.Certificate
	// Vault keeps the private keys in StateDir; nil leaves them readable there.
	Vault Vault
	// Root completes the service root: links to what the routes provide are already set.
	Root func(*schema.ServiceRoot)
	// Schemas are CSDL files of our own by namespace, served under /redfish/v1/schema and referred to in $metadata.
	Schemas []Schema
	// Registries are message registries of our own.
	Registries []Registry
	// Index is the page at "/", outside of Redfish.
	Index string
	// Reach allows the service to connect, for clients, to an address that is otherwise forbidden as it leads to the device itself
	// or to its links. Labs and tests need it.
	Reach func(netip.Addr) bool
	// OEMPrivileges are privileges of our own that the predefined roles have, by role: "Administrator". Roles of clients' making can
	// have any that is named here, and those in MorePrivileges, which no predefined role has.
	OEMPrivileges  map[string][]string
	MorePrivileges []string
	// Audit keeps a record of a change that a client made or tried to make; it is called after the change, one at a time.
	Audit func(AuditRecord) error
	// Conditions are the faults that are open now; nil leaves the resource out.
	Conditions func(*Request) []schema.Condition
	// Telemetry is what the service reports regularly; without metrics it has no TelemetryService.
	Telemetry Telemetry
	// Updater installs software; nil leaves the UpdateService out.
	Updater Updater
	// Limits bound what clients can make the service spend.
	Limits Limits
}

// Credential is a user name and a password.
type Credential struct{ User, Password string }

// Schema is a CSDL file that DMTF does not publish.
type Schema struct {
	Namespace string   // "BackdoorComputerSystem"
	Versions  []string // "v1_0_0"
	// CSDL writes the schema, and JSON the same as JSON schemas by the Ids of their files, "BackdoorState.v1_0_0" and, of a resource,
	// "BackdoorState": each time that one is asked for, which is seldom.
	CSDL func() []byte
	JSON map[string]func() []byte
}

// Registry is a message registry (MessageRegistry.v1_7_0) that DMTF does not publish.
type Registry struct {
	Prefix, Version string // "BackdoorHost", "1.0.0"
	Owner           string
	Description     string
	Messages        map[string]RegistryMessage
}

// RegistryMessage is one message of a Registry.
type RegistryMessage struct {
	Description string        `json:"Description"`
	Message     string        `json:"Message"` // with %1, %2 … for arguments
	Severity    schema.Health `json:"MessageSeverity"`
	NumArgs     int           `json:"NumberOfArgs"`
	ParamTypes  []string      `json:"ParamTypes,omitempty"` // "string" or "number"
	Resolution  string        `json:"Resolution"`
}

// Limits bound what clients can make a Service spend. Zero means the default.
type Limits struct {
	Body           int64         // bytes of a request's body; 64 KiB
	Depth          int           // of JSON; 10
	Header         int           // bytes of a request's header; 16 KiB
	Connections    int           // at a time; 256
	Requests       int           // being worked on at a time; 64
	RequestTime    time.Duration // to read a request and to answer it; 30 s
	IdleTime       time.Duration // of a connection between requests; 90 s
	Sessions       int           // at a time; 64
	UserSessions   int           // at a time of one user; 16
	SessionTimeout time.Duration // without a request; 30 min
	Tasks          int           // kept; 100
	Subscriptions  int           // to events that are pushed; 20
	Streams        int           // of events, open at a time; 10
	UserStreams    int           // of one user; 4
	Page           int           // members of an expanded collection in one answer; 500
	Expanded       int           // resources in one answer; 1000
	Hash           HashCost      // of stored passwords
	LockAfter      int           // failed logins; 5
	LockTime       time.Duration // 30 s
	CachedLogin    time.Duration // how long a checked password is remembered; 60 s
}

func (l *Limits) defaults() {
	set(&l.Body, 64<<10)
	set(&l.Depth, 10)
	set(&l.Header, 16<<10)
	set(&l.Connections, 256)
	set(&l.Requests, 64)
	set(&l.RequestTime, 30*time.Second)
	set(&l.IdleTime, 90*time.Second)
	set(&l.Sessions, 64)
	set(&l.UserSessions, 16)
	set(&l.SessionTimeout, 30*time.Minute)
	set(&l.Tasks, 100)
	set(&l.Subscriptions, 20)
	set(&l.Streams, 10)
	set(&l.UserStreams, 4)
	set(&l.Page, 500)
	set(&l.Expanded, 1000)
	set(&l.Hash, usualHash)
	set(&l.LockAfter, 5)
	set(&l.LockTime, 30*time.Second)
	set(&l.CachedLogin, time.Minute)
}

func set[T comparable](v *T, to T) {
	var zero T
	if *v == zero {
		*v = to
	}
}

// Service is a Redfish service. It is an http.Handler; Serve adds TLS and the limits on connections.
type Service struct {
	log       *slog.Logger
	o         Options
	limits    Limits
	uuid      string
	certs     *certificates
	started   time.Time
	now       func() time.Time
	seed      maphash.Seed // of entity tags
	members   sync.Map     // where structs have properties, by type and name
	tree      node
	accounts  *accounts
	sessions  *sessions
	logins    *logins
	tasks     *tasks
	bus       *eventBus
	reports   *eventBus // of metric reports
	telemetry *telemetry
	subs      *subscriptions
	discovery *discovery
	auditing  sync.Mutex // held while Options.Audit runs
	requests  chan struct{}

	freeze   sync.Once // ends Handle, works out privileges and metadata
	frozen   bool
	metadata []byte
	odata    []byte
	schemas  []namespace
}

// New makes a service with the resources that every service has. The product's own are added by Handle.
func New(o Options) (*Service, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Service{log: o.Logger, o: o, limits: o.Limits, started: time.Now(), now: time.Now, seed: maphash.MakeSeed()}
	s.limits.defaults()
	s.requests = make(chan struct{}, s.limits.Requests)
	if o.StateDir != "" {
		if err := os.MkdirAll(o.StateDir, 0o700); err != nil {
			return nil, fmt.Errorf("make state directory: %w", err)
		}
	}
	var err error
	if s.uuid, err = s.loadUUID(); err != nil {
		return nil, err
	}
	// The accounts first: the hash of a first password takes its time, in which the vault may get its key.
	if s.accounts, err = openAccounts(s); err != nil {
		return nil, err
	}
	if s.certs, err = openCertificates(s); err != nil {
		return nil, err
	}
	s.sessions = newSessions(s)
	s.logins = newLogins(s)
	s.tasks = newTasks(s)
	s.bus, s.reports = newEventBus(), newEventBus()
	if s.telemetry, err = openTelemetry(s); err != nil {
		return nil, err
	}
	if s.subs, err = openSubscriptions(s); err != nil {
		return nil, err
	}
	if s.discovery, err = openDiscovery(s); err != nil {
		return nil, err
	}
	s.Handle(s.standardRoutes()...)
	return s, nil
}

// UUID identifies the service; it stays the same as long as the state directory does.
func (s *Service) UUID() string { return s.uuid }

// Certificate returns the certificate that the service shows, for clients to pin.
func (s *Service) Certificate() *x509.Certificate { return s.certs.current().Leaf }

// Handle adds resources. A route that cannot work (no type, a method that the kind of route cannot have, an URI that is taken)
// is a programmer's error and panics, as does a call after serving has begun.
func (s *Service) Handle(routes ...Route) {
	if s.frozen {
		panic("Handle after serving has begun")
	}
	for i := range routes {
		r := routes[i]
		if err := r.check(); err != nil {
			panic(fmt.Sprintf("route %s: %v", r.URI, err))
		}
		n := s.tree.add(r.URI)
		if n.route != nil {
			panic(fmt.Sprintf("route %s: is taken", r.URI))
		}
		n.route = &r
		r.writable = r.Patch.annotation()
		for i := range r.Actions {
			s.addAction(n, r.URI, &r.Actions[i])
		}
		if r.Entries != nil {
			s.Handle(r.entry())
		}
	}
}

func (r *Route) check() error {
	kinds := 0
	for _, has := range []bool{r.Get != nil, r.Members != nil, r.Entries != nil, r.Document != nil, r.Handler != nil, r.Download != nil, r.Stream != nil, r.Upload != nil} {
		if has {
			kinds++
		}
	}
	switch {
	case kinds != 1:
		return errors.New("wants exactly one of Get, Members, Entries, Document, Handler, Download, Stream and Upload")
	case r.Document == nil && r.Type == "":
		return errors.New("has no type")
	case r.collection() && (r.Patch != nil || r.Delete != nil || len(r.Actions) > 0):
		return errors.New("is a collection, which cannot be changed as a whole")
	case !r.collection() && r.Create != nil:
		return errors.New("is not a collection, and cannot take new members")
	case strings.HasSuffix(r.URI, "/") && r.URI != "/":
		return errors.New("ends in a slash")
	}
	return nil
}

// entry is the route of the members of a collection that has Entries.
func (r *Route) entry() Route {
	return Route{
		URI:  r.URI + "/{entry}",
		Type: memberType(r.Type),
		Get: func(q *Request) (schema.Object, error) {
			all, err := r.Entries(q)
			if err != nil {
				return nil, err
			}
			for i := range all.Len {
				if all.ID(i) == q.Param("entry") {
					return all.At(i)
				}
			}
			return nil, ErrNotFound
		},
	}
}

// addAction puts an action's target, and its ActionInfo, under the resource.
func (s *Service) addAction(owner *node, uri string, a *Action) {
	a.key, a.target, a.info = "#"+a.Name, "/Actions/", "/"+actionInfoName(a)
	if a.OEM {
		a.target += "Oem/"
	}
	a.target += a.Name
	n := s.tree.add(uri + a.target)
	n.action, n.owner = a, owner
	if len(a.Parameters) > 0 {
		s.Handle(actionInfo(uri, a))
	}
}

// actionInfoName is the last segment of the URI of an action's ActionInfo.
func actionInfoName(a *Action) string {
	_, name, _ := strings.Cut(a.Name, ".")
	return name + "ActionInfo"
}

func actionInfo(uri string, a *Action) Route {
	return Route{
		URI:  uri + "/" + actionInfoName(a),
		Type: "ActionInfo.v1_5_0.ActionInfo",
		Get: func(r *Request) (schema.Object, error) {
			info := &schema.ActionInfo{Resource: schema.Resource{Name: a.Name + " action"}}
			for _, p := range a.Parameters {
				out := schema.ActionParameter{Name: p.Name, Required: p.Required, DataType: string(p.Kind), AllowableValues: p.allowed(r)}
				if p.Kind == Number && (p.Min != 0 || p.Max != 0) {
					out.MinimumValue, out.MaximumValue = &p.Min, &p.Max
				}
				info.Parameters = append(info.Parameters, out)
			}
			return info, nil
		},
	}
}

func (p *Property) allowed(r *Request) []string {
	if p.Allowed != nil {
		return p.Allowed(r)
	}
	return p.Values
}

func (s *Service) path(name string) string { return filepath.Join(s.o.StateDir, name) }

var _ http.Handler = (*Service)(nil)
