package service

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Route is one resource of the tree, or one family of resources that differ in an Id. What a route does not declare, the
// service refuses with the right status; what all resources must do (HEAD, ETag, $select, …) it does for every route.
type Route struct {
	// URI is the whole path, such as "/redfish/v1/Systems/{system}/LogServices". A segment in braces takes any Id, which
	// Request.Param gives back.
	URI string
	// Type is the schema type without its "#", such as "ComputerSystem.v1_27_0.ComputerSystem".
	Type string
	// Entity names the row of the privilege registry; if empty, the schema's name.
	Entity string

	// Get returns a fresh value; the service fills in its Id (unless set), @odata members and Actions. A resource that
	// is not there is ErrNotFound.
	Get func(*Request) (schema.Object, error)

	// Members makes the route a collection: it returns the Ids of the members, in order. The members have a route of their own.
	Members func(*Request) ([]string, error)
	// Entries makes the route a collection whose members are always expanded, as LogEntryCollection's are. The members get
	// their own route from here.
	Entries func(*Request) (Listing, error)
	// Excerpt are the properties that the schema marks as Redfish.Excerpt; nil means all.
	Excerpt []string
	// Name is the name of a collection.
	Name string

	Create *Create
	Patch  *Patch
	Delete func(*Request) error
	// Actions of the resource, each with its own target and, if it has parameters, ActionInfo.
	Actions []Action
	// Available, if not nil, tells whether an action is offered now; it then is neither listed nor taken.
	Available func(*Request, Action) bool

	// Document makes the route a plain document instead of a resource, which GET returns without authentication.
	Document func() (contentType string, body []byte)
	// Download makes the route a file instead of a resource, of which clients may ask for parts (RFC 9110, section 14).
	Download func(*Request) (*File, error)
	// Handler takes over GET and HEAD where an answer is not a representation of the resource (the task monitor).
	Handler func(*Request) (*Reply, error)
	// Stream takes over GET with an answer that goes on and on. It is not counted as a request being worked on.
	Stream func(*Request, http.ResponseWriter) error
	// Upload makes the route one that takes POST only, with a body that it reads itself, however long it is.
	Upload func(*Request, http.ResponseWriter) (*Reply, error)

	schemaURI string   // of the schema, if it is our own
	link      []string // the Link header that names the schema; set when serving starts
	writable  []byte   // the annotation that names the properties that PATCH takes, as a member of the resource
}

// File is what a Download sends. The service closes Content.
type File struct {
	Content io.ReadSeekCloser
	Type    string // media type; empty means application/octet-stream
	Name    string // proposed to the client; empty means none
	Made    time.Time
}

// Listing is the members of a collection that are made only when they are asked for.
type Listing struct {
	Len int
	// ID returns the Id of member i, and At the member, whose Id the service fills in.
	ID func(i int) string
	At func(i int) (schema.Object, error)
}

// Create is how a collection takes a POST.
type Create struct {
	Properties []Property
	// Do returns the new member's Id. A Reply overrides what the service would answer: 201, Location and the new member.
	Do func(*Request, Values) (id string, reply *Reply, err error)
	// Open says that no authentication is asked for, as for sessions.
	Open bool
}

// Patch is how a resource takes a PATCH.
type Patch struct {
	Properties []Property
	// Do is called with the properties that passed their checks, at least one. The others are reported to the client.
	Do func(*Request, Values) error
}

// Action is one action of a resource.
type Action struct {
	Name       string // "ComputerSystem.Reset"
	Title      string
	OEM        bool // listed under Oem, with Oem in its target
	Parameters []Property
	// Do runs the action. A nil Reply is 204. What takes long ends with Request.Task.
	Do func(*Request, Values) (*Reply, error)
	// Privileges, if set, are asked for instead of those of a POST to the resource.
	Privileges Privileges

	// The name among the resource's actions, and the paths of target and ActionInfo below the resource.
	key, target, info string
}

// Property is one property of a request body, or one parameter of an action. Name may be a path, "Boot/BootSourceOverrideTarget".
type Property struct {
	Name     string
	Kind     Kind
	Required bool
	Null     bool                    // null is allowed, and means "no value"
	Values   []string                // if set, the values allowed
	Allowed  func(*Request) []string // the same where they depend on the resource's state
	Min, Max int64                   // of a Number; of a String, its length; unchecked if both are zero
	// Privileges, if set, are asked for instead of those of a PATCH to the resource.
	Privileges Privileges
}

// Kind is the JSON type of a property, in ActionInfo's words.
type Kind string

// The kinds that the project uses.
const (
	String      Kind = "String"
	Boolean     Kind = "Boolean"
	Number      Kind = "Number" // an integer
	StringArray Kind = "StringArray"
	Object      Kind = "Object" // unchecked inside
	ObjectArray Kind = "ObjectArray"
)

// Values are checked properties by name. What the client did not send is not in the map; null is there as nil.
type Values map[string]any

// Has reports whether the client sent the property.
func (v Values) Has(name string) bool { _, ok := v[name]; return ok }

// String returns a String property, or "" if it was not sent.
func (v Values) String(name string) string { s, _ := v[name].(string); return s }

// Bool returns a Boolean property, or false if it was not sent.
func (v Values) Bool(name string) bool { b, _ := v[name].(bool); return b }

// Int returns a Number property, or 0 if it was not sent.
func (v Values) Int(name string) int64 { n, _ := v[name].(int64); return n }

// Strings returns a StringArray property, or nil if it was not sent.
func (v Values) Strings(name string) []string { s, _ := v[name].([]string); return s }

// Reply is an answer that is not simply the resource.
type Reply struct {
	Status   int    // 0 means 200 with a body, 204 without
	Location string // URI
	Body     any    // a schema.Object or any JSON-able value
	Header   http.Header
}

// Caller is who sent a request.
type Caller struct {
	User       string
	Role       string
	Session    string // Id of the session; empty for HTTP basic authentication
	Address    string // IP address
	privileges []string
}

// Request is one request for a resource, already routed, authenticated and allowed.
type Request struct {
	URI    string // of the resource, without a trailing slash
	Caller Caller

	ctx    context.Context
	svc    *Service
	node   *node
	params map[string]string
	http   *http.Request
	body   []byte // of the request, as far as it was read
}

// Context ends when the client goes away or the service stops.
func (r *Request) Context() context.Context { return r.ctx }

// Param returns the Id that stood for a segment in braces.
func (r *Request) Param(name string) string { return r.params[name] }

// node is one segment of the tree.
type node struct {
	segment  string // "Systems", or "{system}"
	parent   *node
	children map[string]*node
	wild     *node
	route    *Route
	action   *Action // the node is the target of this action of the parent resource
	owner    *node   // of an action's target: the resource

	// Worked out once, when serving starts.
	privileges operations
	allow      []string // methods
	allowed    []string // the same as the Allow header
}

// entity returns the name of the privilege registry's row.
func (r *Route) entity() string {
	if r.Entity != "" {
		return r.Entity
	}
	name, _, _ := strings.Cut(r.Type, ".")
	return name
}

func (r *Route) collection() bool { return r.Members != nil || r.Entries != nil }

// add puts a route into the tree.
func (n *node) add(uri string) *node {
	for segment := range strings.SplitSeq(strings.Trim(uri, "/"), "/") {
		if segment == "" {
			continue
		}
		if strings.HasPrefix(segment, "{") {
			if n.wild == nil {
				n.wild = &node{segment: segment, parent: n}
			}
			if n.wild.segment != segment {
				panic(fmt.Sprintf("route %s: %s is called %s elsewhere", uri, segment, n.wild.segment))
			}
			n = n.wild
			continue
		}
		child := n.children[segment]
		if child == nil {
			child = &node{segment: segment, parent: n}
			if n.children == nil {
				n.children = map[string]*node{}
			}
			n.children[segment] = child
		}
		n = child
	}
	return n
}

// find returns the node of a path and the Ids in it, or nil. One slash at the end is allowed, and so is "Members" behind a collection.
func (n *node) find(path string) (*node, map[string]string) {
	rest, ok := strings.CutPrefix(path, "/")
	if !ok {
		return nil, nil
	}
	rest = strings.TrimSuffix(rest, "/")
	if rest == "" {
		return n, nil
	}
	var params map[string]string
	segments := strings.Split(rest, "/")
	for i, segment := range segments {
		if child := n.children[segment]; child != nil {
			n = child
			continue
		}
		if segment == "Members" && i == len(segments)-1 && n.route != nil && n.route.collection() {
			return n, params
		}
		if n.wild == nil || segment == "" {
			return nil, nil
		}
		n = n.wild
		if params == nil {
			params = map[string]string{}
		}
		params[strings.Trim(n.segment, "{}")] = segment
	}
	return n, params
}

// walk calls f for every node with a route, parents first, siblings in order.
func (n *node) walk(f func(*node)) {
	if n.route != nil {
		f(n)
	}
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		n.children[name].walk(f)
	}
	if n.wild != nil {
		n.wild.walk(f)
	}
}
