package service

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"mime"
	"net"
	"net/http"
	"reflect"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// ServeHTTP answers one request. It is where everything happens that is the same for all resources.
func (s *Service) ServeHTTP(w http.ResponseWriter, hr *http.Request) {
	s.freeze.Do(s.finish)
	maps.Copy(w.Header(), everyAnswer)

	select {
	case s.requests <- struct{}{}:
	default:
		e := refuse(http.StatusServiceUnavailable, "ServiceTemporarilyUnavailable", "1")
		e.Header = http.Header{"Retry-After": {"1"}}
		s.writeError(w, hr, e)
		return
	}
	release := sync.OnceFunc(func() { <-s.requests })
	defer release()
	defer func() {
		if p := recover(); p != nil {
			if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(p)
			}
			s.log.Error("request panicked", "method", hr.Method, "path", hr.URL.Path, "panic", p, "stack", string(debug.Stack()))
			s.writeError(w, hr, refuse(500, "InternalError"))
		}
	}()
	ctx, cancel := context.WithTimeout(hr.Context(), s.limits.RequestTime)
	defer cancel()
	if err := s.serve(ctx, w, hr, release); err != nil {
		s.writeError(w, hr, err)
	}
}

// everyAnswer are the headers of every answer, by their canonical names: the values are shared, and never changed.
var everyAnswer = http.Header{
	"Odata-Version": {"4.0"}, "Cache-Control": {"no-cache"}, "X-Content-Type-Options": {"nosniff"},
	"Strict-Transport-Security": {"max-age=31536000"}, "Content-Security-Policy": {"default-src 'none'; frame-ancestors 'none'"},
}

// jsonContent is the Content-Type of resources.
var jsonContent = []string{"application/json;charset=utf-8"}

// methods are the ones that HTTP knows; for others the status is 501.
var methods = []string{"GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS", "TRACE", "CONNECT"}

// serve routes, admits and answers a request. It calls release once the request is no longer being worked on.
func (s *Service) serve(ctx context.Context, w http.ResponseWriter, hr *http.Request, release func()) error {
	n, params := s.route(hr)
	if n == nil {
		return &Error{Status: 404, Messages: []schema.Message{message("InvalidURI", hr.URL.Path)}}
	}
	allow := n.allow
	w.Header()["Allow"] = n.allowed
	if !slices.Contains(methods, hr.Method) {
		return Because(http.StatusNotImplemented, "OperationNotAllowed", "The service does not know the HTTP method of the request.")
	}
	if !slices.Contains(allow, hr.Method) {
		return refuse(http.StatusMethodNotAllowed, "OperationNotAllowed")
	}
	if v := hr.Header.Get("OData-Version"); v != "" && v != "4.0" {
		e := refuse(http.StatusPreconditionFailed, "HeaderInvalid", "OData-Version")
		e.Messages[0].Resolution = "Resubmit the request with the OData-Version 4.0."
		return e
	}
	if n.route != nil && n.route.Document != nil {
		contentType, body := n.route.Document()
		return s.writeDocument(w, hr, contentType, body)
	}
	media := "application/json"
	switch {
	case n.route != nil && n.route.Stream != nil:
		media = "text/event-stream"
	case n.route != nil && n.route.Download != nil:
		media = "application/octet-stream"
	}
	if media != "application/octet-stream" && !acceptable(hr.Header.Values("Accept"), media) {
		return refuse(http.StatusNotAcceptable, "HeaderInvalid", "Accept")
	}

	r := &Request{URI: canonical(hr.URL.Path, n), ctx: ctx, svc: s, node: n, params: params, http: hr}
	r.Caller.Address = remoteIP(hr)
	if err := s.admit(r); err != nil {
		return err
	}
	if n.route != nil && n.route.Download != nil {
		r.ctx = hr.Context() // a file may take as long as the client goes on taking it
	}
	if n.route != nil && n.route.Stream != nil {
		if hr.Method == http.MethodHead {
			w.Header().Set("Content-Type", media)
			return nil
		}
		release()
		return n.route.Stream(r, w)
	}
	if n.route != nil && n.route.Upload != nil {
		release()
		reply, err := n.route.Upload(r, w)
		s.audit(r, "POST", err)
		if err != nil {
			return err
		}
		return s.writeReply(w, r, reply)
	}
	q, e := parseQuery(hr.URL.RawQuery)
	if e != nil {
		return e
	}
	switch hr.Method {
	case http.MethodGet, http.MethodHead:
		return s.get(w, r, q)
	}
	if !q.empty() {
		return refuse(400, "QueryNotSupportedOnOperation")
	}
	switch hr.Method {
	case http.MethodPost:
		return s.post(w, r)
	case http.MethodPatch:
		return s.patch(w, r)
	default:
		return s.delete(w, r)
	}
}

// route finds the node of a request.
func (s *Service) route(hr *http.Request) (*node, map[string]string) {
	// Encoded slashes and NULs occur in no Id of ours, only in attempts to confuse somebody.
	if raw := strings.ToLower(hr.URL.EscapedPath()); strings.Contains(raw, "%2f") || strings.Contains(raw, "%5c") || strings.Contains(raw, "%00") || len(raw) > 1024 {
		return nil, nil
	}
	n, params := s.tree.find(hr.URL.Path)
	if n == nil || n.route == nil && n.action == nil {
		return nil, nil
	}
	return n, params
}

// canonical returns the URI of a resource without the trailing slash and the "/Members" that requests may have.
func canonical(path string, n *node) string {
	path = strings.TrimSuffix(path, "/")
	if n.route != nil && n.route.collection() && n.segment != "Members" {
		path = strings.TrimSuffix(path, "/Members")
	}
	return path
}

func remoteIP(hr *http.Request) string {
	host, _, err := net.SplitHostPort(hr.RemoteAddr)
	if err != nil {
		return hr.RemoteAddr
	}
	return host
}

// methods returns what the resource takes.
func (n *node) methods() []string {
	if n.action != nil || n.route.Upload != nil {
		return []string{"POST"}
	}
	m := []string{"GET", "HEAD"}
	if n.route.Create != nil {
		m = append(m, "POST")
	}
	if n.route.Patch != nil {
		m = append(m, "PATCH")
	}
	if n.route.Delete != nil {
		m = append(m, "DELETE")
	}
	return m
}

// admit authenticates the caller and checks the privileges.
func (s *Service) admit(r *Request) error {
	method := r.http.Method
	need := r.node.privileges[method]
	if create := r.node.route; create != nil && create.Create != nil && create.Create.Open && method == http.MethodPost || need.open() {
		return nil
	}
	change, err := s.authenticate(r)
	if err != nil {
		return err
	}
	own := s.own(r)
	if change && !(own && r.node.route.entity() == "ManagerAccount" && (method == "GET" || method == "HEAD" || method == "PATCH")) {
		a, _ := s.accounts.byUser(r.Caller.User)
		return refuse(http.StatusForbidden, "PasswordChangeRequired", accountsURI+"/"+a.ID)
	}
	if need.allows(r.Caller.privileges, own) {
		return nil
	}
	if method == http.MethodPatch && r.node.route != nil {
		for _, p := range r.node.route.Patch.Properties {
			if r.node.property(&p).allows(r.Caller.privileges, own) {
				return nil // for this property at least; patch looks at each
			}
		}
	}
	return refuse(http.StatusForbidden, "InsufficientPrivilege")
}

// property returns what a PATCH of a property needs.
func (n *node) property(p *Property) Privileges {
	if p.Privileges != nil {
		return p.Privileges
	}
	return propertyPrivileges(n.route.entity(), p.Name, n.privileges["PATCH"])
}

// authenticate finds out who calls, by a session's token, by HTTP basic authentication, or by the client's certificate.
func (s *Service) authenticate(r *Request) (change bool, err error) {
	var a account
	if token := r.http.Header.Get("X-Auth-Token"); token != "" {
		c, ok := s.sessions.use(token)
		if !ok {
			return false, unauthorized()
		}
		if a, ok = s.accounts.byUser(c.user); !ok || !a.Enabled {
			return false, unauthorized()
		}
		r.Caller.Session = c.id
	} else if header := r.http.Header.Get("Authorization"); header != "" {
		user, password, ok := parseBasic(header)
		if !ok {
			return false, unauthorized()
		}
		if a, err = s.logins.check(user, password, r.Caller.Address); err != nil {
			return false, err
		}
	} else if user, ok := s.certs.user(r.http.TLS); ok {
		if a, ok = s.accounts.byUser(user); !ok || !a.Enabled {
			return false, unauthorized()
		}
		a.Change = false // the password is not what let the caller in
	} else {
		return false, unauthorized()
	}
	r.Caller.User, r.Caller.Role, r.Caller.privileges = a.User, a.Role, s.privileges(a.Role)
	return a.Change, nil
}

// get answers GET and HEAD.
func (s *Service) get(w http.ResponseWriter, r *Request, q query) error {
	if h := r.node.route.Handler; h != nil {
		reply, err := h(r)
		if err != nil {
			return r.missing(err)
		}
		return s.writeReply(w, r, reply)
	}
	if r.node.route.Download != nil {
		return s.download(w, r)
	}
	body, etag, err := s.render(r, q)
	if err != nil {
		return r.missing(err)
	}
	if !q.empty() {
		if body, etag, err = s.query(r, q, body); err != nil {
			return err
		}
	}
	h := w.Header()
	h["Link"] = r.node.route.link
	h["Etag"] = []string{etag}
	if matchesETag(r.http.Header.Values("If-None-Match"), etag, same) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	h["Content-Type"] = jsonContent
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(http.StatusOK)
	if r.http.Method == http.MethodHead {
		return nil
	}
	_, err = w.Write(body)
	return s.gone(err)
}

// gone notes that a client went away in the middle of its answer, about which nothing can be done.
func (s *Service) gone(err error) error {
	if err != nil {
		s.log.Debug("write answer", "err", err)
	}
	return nil
}

// render makes the representation of a resource. Of the query, it looks at $filter, $top and $skip only.
func (s *Service) render(r *Request, q query) (body []byte, etag string, err error) {
	route := r.node.route
	var o schema.Object
	switch {
	case route.Get != nil:
		if o, err = route.Get(r); err != nil {
			return nil, "", err
		}
	case route.collection():
		if o, err = s.collect(r, q); err != nil {
			return nil, "", err
		}
	default:
		return nil, "", ErrNotFound
	}
	return r.marshal(o)
}

// marshal completes the common part of a resource and encodes it.
func (r *Request) marshal(o schema.Object) (body []byte, etag string, err error) {
	m := o.Meta()
	route := r.node.route
	m.ODataID = r.URI
	m.ODataType = "#" + route.Type
	if r.URI == "/redfish/v1" {
		m.ODataID = "/redfish/v1/"
	}
	if m.ID == "" && !route.collection() {
		m.ID = r.URI[strings.LastIndexByte(r.URI, '/')+1:]
	}
	for i := range route.Actions {
		a := &route.Actions[i]
		if route.Available != nil && !route.Available(r, *a) {
			continue
		}
		if m.Actions == nil {
			m.Actions = make(schema.Actions, len(route.Actions))
		}
		m.Actions[a.key] = r.action(a)
	}
	body, err = json.Marshal(o)
	if err != nil {
		return nil, "", fmt.Errorf("encode %s: %w", r.URI, err)
	}
	if m.ODataETag != "" {
		return body, m.ODataETag, nil
	}
	settings, err := r.settings(o)
	if err != nil {
		return nil, "", fmt.Errorf("encode %s: %w", r.URI, err)
	}
	etag = r.svc.etag(body, settings)
	out := make([]byte, 0, len(body)+len(etag)+len(route.writable)+24)
	out = append(out, `{"@odata.etag":`...)
	out = strconv.AppendQuote(out, etag)
	out = append(out, ',')
	out = append(out, route.writable...)
	return append(out, body[1:]...), etag, nil
}

// annotation is "@Redfish.WriteableProperties" with the properties at the top of the resource; a resource with others, in objects,
// annotates those objects itself.
func (p *Patch) annotation() []byte {
	if p == nil {
		return nil
	}
	var names []string
	for _, w := range p.Properties {
		if !strings.Contains(w.Name, "/") {
			names = append(names, w.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	b, err := json.Marshal(names)
	if err != nil {
		panic(err) // strings only
	}
	return fmt.Appendf(nil, `"@Redfish.WriteableProperties":%s,`, b)
}

func (r *Request) action(a *Action) schema.Action {
	out := schema.Action{Target: r.URI + a.target, Title: a.Title, OEM: a.OEM}
	if len(a.Parameters) > 0 {
		out.ActionInfo = r.URI + a.info
	}
	for i := range a.Parameters {
		p := &a.Parameters[i]
		if values := p.allowed(r); values != nil {
			if out.Allowable == nil {
				out.Allowable = map[string][]string{}
			}
			out.Allowable[p.Name] = values
		}
	}
	return out
}

// etag returns a weak entity tag of a representation: the same content has the same tag until the service starts anew. Behind a
// colon is that of what a client can change, if there is such: see unchanged.
func (s *Service) etag(body, settings []byte) string {
	tag := `W/"` + strconv.FormatUint(maphash.Bytes(s.seed, body), 36)
	if settings != nil {
		tag += ":" + strconv.FormatUint(maphash.Bytes(s.seed, settings), 36)
	}
	return tag + `"`
}

// settings encodes the properties of a resource that PATCH takes; nil if there are none.
func (r *Request) settings(o schema.Object) ([]byte, error) {
	spec := r.node.route.Patch
	if spec == nil {
		return nil, nil
	}
	all := []byte{} // not nil: there are settings, though none may have a value now
	for _, p := range spec.Properties {
		v, ok := r.svc.at(reflect.ValueOf(o), p.Name)
		if !ok {
			continue
		}
		b, err := json.Marshal(v.Interface())
		if err != nil {
			return nil, err
		}
		all = append(append(all, b...), '\n')
	}
	return all, nil
}

// at returns the value of a property, such as "Boot/BootSourceOverrideTarget", or of the innermost object around it that is no struct;
// false if there is none.
func (s *Service) at(v reflect.Value, path string) (reflect.Value, bool) {
	for {
		for v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface {
			if v.IsNil() {
				return v, false
			}
			v = v.Elem()
		}
		if path == "" || v.Kind() != reflect.Struct {
			return v, true
		}
		var name string
		name, path, _ = strings.Cut(path, "/")
		index, ok := s.member(v.Type(), name)
		if !ok {
			return v, false
		}
		f, err := v.FieldByIndexErr(index)
		if err != nil {
			return v, false // of an embedded struct that is not there
		}
		v = f
	}
}

// member returns where a struct has the field that is a property.
func (s *Service) member(t reflect.Type, property string) (index []int, ok bool) {
	type key struct {
		t        reflect.Type
		property string
	}
	if v, ok := s.members.Load(key{t, property}); ok {
		index = v.([]int)
		return index, index != nil
	}
	for _, f := range reflect.VisibleFields(t) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); f.IsExported() && name == property {
			index = f.Index
			break
		}
	}
	s.members.Store(key{t, property}, index)
	return index, index != nil
}

// collect makes the representation of a collection.
func (s *Service) collect(r *Request, q query) (schema.Object, error) {
	c := &schema.Collection{Resource: schema.Resource{Name: r.node.route.Name}, Members: []json.RawMessage{}}
	var total int
	var member func(i int) (json.RawMessage, error)
	limit := s.limits.Page
	if r.node.route.Members != nil {
		ids, err := r.node.route.Members(r)
		if err != nil {
			return nil, err
		}
		total, limit = len(ids), len(ids)
		member = func(i int) (json.RawMessage, error) { return json.Marshal(schema.Link{ID: r.URI + "/" + ids[i]}) }
	} else {
		all, err := r.node.route.Entries(r)
		if err != nil {
			return nil, err
		}
		total = all.Len
		member = func(i int) (json.RawMessage, error) {
			sub, err := r.sub(r.URI + "/" + all.ID(i))
			if err != nil {
				return nil, err
			}
			o, err := all.At(i)
			if err != nil {
				return nil, err
			}
			b, _, err := sub.marshal(o)
			return b, err
		}
	}
	if q.filter != nil {
		hits, err := s.matches(r, q.filter, total, member)
		if err != nil {
			return nil, err
		}
		all := member
		total, member = len(hits), func(i int) (json.RawMessage, error) { return all(hits[i]) }
	}
	c.Count = total
	first := min(q.skip, total)
	last := total
	if q.top >= 0 {
		last = min(last, first+q.top)
	}
	if last-first > limit {
		last = first + limit
		c.NextLink = r.URI + "?$skip=" + strconv.Itoa(last)
		if q.top >= 0 {
			c.NextLink += "&$top=" + strconv.Itoa(q.top-limit)
		}
		if q.filter != nil {
			c.NextLink += "&$filter=" + q.text
		}
	}
	for i := first; i < last; i++ {
		b, err := member(i)
		if err != nil {
			return nil, err
		}
		c.Members = append(c.Members, b)
	}
	return c, nil
}

// sub returns a request of the same caller for another resource.
func (r *Request) sub(uri string) (*Request, error) {
	n, params := r.svc.tree.find(uri)
	if n == nil || n.route == nil || n.route.Document != nil || n.route.Handler != nil || n.route.Download != nil || n.route.Stream != nil || n.route.Upload != nil {
		return nil, ErrNotFound
	}
	return &Request{URI: canonical(uri, n), Caller: r.Caller, ctx: r.ctx, svc: r.svc, node: n, params: params, http: r.http}, nil
}

// missing turns ErrNotFound into the refusal that names the resource.
func (r *Request) missing(err error) error {
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	n := r.node
	if n.owner != nil {
		n = n.owner
	}
	name := r.URI
	if n.wild == nil && strings.HasPrefix(n.segment, "{") {
		name = r.Param(strings.Trim(n.segment, "{}"))
	}
	return refuse(404, "ResourceNotFound", n.route.entity(), name)
}

// post creates a member or runs an action.
func (s *Service) post(w http.ResponseWriter, r *Request) error {
	if err := s.readBody(w, r); err != nil {
		return err
	}
	if a := r.node.action; a != nil {
		return s.act(w, r, a)
	}
	create := r.node.route.Create
	values, e := strict(checker{r: r}, create.Properties, r.body, s.limits.Depth)
	if e != nil {
		return e
	}
	id, reply, err := create.Do(r, values)
	if err != nil {
		if !create.Open { // strangers must not be able to fill the audit trail
			s.audit(r, "POST", err)
		}
		return r.missing(err)
	}
	member, err := r.sub(r.URI + "/" + id)
	if err != nil {
		return err
	}
	if reply == nil {
		reply = &Reply{}
	}
	if reply.Status == 0 {
		reply.Status = http.StatusCreated
	}
	if reply.Location == "" {
		reply.Location = member.URI
	}
	s.audit(r, "POST", nil)
	s.Publish(Event{MessageID: resourceEvent + "ResourceCreated", Origin: member.URI})
	if o, ok := reply.Body.(schema.Object); ok {
		reply.Body = nil
		b, etag, err := member.marshal(o)
		if err != nil {
			return err
		}
		return s.writeJSON(w, r, reply, b, etag)
	}
	// The creator may lack the right to see what was created, so this is not a GET of the caller's own.
	b, etag, err := s.render(member, query{top: -1})
	if err != nil {
		return member.missing(err)
	}
	return s.writeJSON(w, r, reply, b, etag)
}

// act runs an action. If-Match is not looked at: widespread clients send the resource's tag with each of their actions, and
// an action is not a change of the representation that the tag stands for.
func (s *Service) act(w http.ResponseWriter, r *Request, a *Action) error {
	owner := r.node.owner
	// The action sees its resource's URI, and none of it if the resource is not there.
	r.URI = r.URI[:strings.LastIndex(r.URI, "/Actions/")]
	if owner.route.Available != nil {
		resource := *r
		resource.node = owner
		if !owner.route.Available(&resource, *a) {
			return refuse(400, "ActionNotSupported", a.Name)
		}
	}
	if len(r.params) > 0 && owner.route.Get != nil {
		resource := *r
		resource.node = owner
		if _, err := owner.route.Get(&resource); err != nil {
			return resource.missing(err)
		}
	}
	values, e := strict(checker{action: a.Name, r: r}, a.Parameters, r.body, s.limits.Depth)
	if e != nil {
		return e
	}
	reply, err := a.Do(r, values)
	s.audit(r, a.Name, err)
	if err != nil {
		return r.missing(err)
	}
	return s.writeReply(w, r, reply)
}

// patch changes properties. What cannot be written does not keep the rest from being written, as the specification wants it.
func (s *Service) patch(w http.ResponseWriter, r *Request) error {
	if err := s.readBody(w, r); err != nil {
		return err
	}
	spec := r.node.route.Patch
	before, etag, err := s.render(r, query{top: -1})
	if err != nil {
		return r.missing(err)
	}
	if err := precondition(r.http, etag, unchanged); err != nil {
		return err
	}
	fields, e := parseBody(r.body, s.limits.Depth, wholeObjects(spec.Properties))
	if e != nil {
		return e
	}
	values := Values{}
	var bad *Error
	sent, forbidden := 0, 0
	check := checker{r: r}
	own := s.own(r)
	for _, f := range fields {
		if annotation(f.name) {
			continue
		}
		sent++
		p := property(spec.Properties, f.name)
		if p == nil {
			id := "PropertyUnknown"
			if exists(before, f.name) {
				id = "PropertyNotWritable"
			}
			bad = bad.join(refuse(400, id, f.name).about(f.name))
			continue
		}
		if !r.node.property(p).allows(r.Caller.privileges, own) {
			forbidden++
			bad = bad.join(refuse(403, "InsufficientPrivilege").about(f.name))
			continue
		}
		v, e := check.check(p, f)
		if e != nil {
			bad = bad.join(e)
			continue
		}
		values[f.name] = v
	}
	switch {
	case sent == 0 && len(fields) == 0:
		return refuse(400, "EmptyJSON")
	case sent == 0:
		return refuse(400, "NoOperation")
	case len(values) == 0:
		bad.Status = 400
		if forbidden == sent {
			bad.Status = 403
		}
		return bad
	}
	if r.Caller.User != "" && s.mustChange(r.Caller.User) && (len(values) != 1 || !values.Has("Password")) {
		a, _ := s.accounts.byUser(r.Caller.User)
		return refuse(http.StatusForbidden, "PasswordChangeRequired", accountsURI+"/"+a.ID)
	}
	err = spec.Do(r, values)
	s.audit(r, "PATCH", err)
	if err != nil {
		return r.missing(err)
	}
	s.Publish(Event{MessageID: resourceEvent + "ResourceChanged", Origin: r.URI})
	body, etag, err := s.render(r, query{top: -1})
	if err != nil {
		return r.missing(err)
	}
	if bad != nil {
		if body, err = annotate(body, bad.Messages); err != nil {
			return err
		}
	}
	return s.writeJSON(w, r, &Reply{Status: 200}, body, etag)
}

func (s *Service) mustChange(user string) bool {
	a, ok := s.accounts.byUser(user)
	return ok && a.Change
}

// annotate puts messages about properties into a representation.
func annotate(body []byte, messages []schema.Message) ([]byte, error) {
	b, err := json.Marshal(messages)
	if err != nil {
		return nil, err
	}
	out := bytes.TrimSuffix(body, []byte("}"))
	out = append(slices.Clone(out), `,"@Message.ExtendedInfo":`...)
	return append(append(out, b...), '}'), nil
}

// exists reports whether a representation has a property at a path, or something on its way that only a known resource has.
func exists(body []byte, path string) bool {
	var v any
	if json.Unmarshal(body, &v) != nil {
		return false
	}
	for name := range strings.SplitSeq(path, "/") {
		m, ok := v.(map[string]any)
		if !ok {
			return false
		}
		if v, ok = m[name]; !ok {
			return false
		}
	}
	return true
}

// delete removes the resource.
func (s *Service) delete(w http.ResponseWriter, r *Request) error {
	if r.http.Header.Get("If-Match") != "" && r.node.route.Get != nil {
		_, etag, err := s.render(r, query{top: -1})
		if err != nil {
			return r.missing(err)
		}
		if err := precondition(r.http, etag, same); err != nil {
			return err
		}
	}
	err := r.node.route.Delete(r)
	s.audit(r, "DELETE", err)
	if err != nil {
		return r.missing(err)
	}
	s.Publish(Event{MessageID: resourceEvent + "ResourceRemoved", Origin: r.URI})
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// readBody reads the body of a POST or PATCH, within limits of size and, by the server's deadline, time.
func (s *Service) readBody(w http.ResponseWriter, r *Request) error {
	limit := s.limits.Body
	if r.Caller.User == "" {
		limit = min(limit, 4<<10) // a login needs no more
	}
	if r.http.ContentLength > limit {
		return tooLarge(w)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.http.Body, limit))
	var big *http.MaxBytesError
	switch {
	case errors.As(err, &big):
		return tooLarge(w)
	case err != nil:
		return refuse(http.StatusRequestTimeout, "UnrecognizedRequestBody")
	}
	if len(body) > 0 {
		media, params, err := mime.ParseMediaType(r.http.Header.Get("Content-Type"))
		charset := strings.ToLower(params["charset"])
		if err != nil || media != "application/json" || charset != "" && charset != "utf-8" {
			return refuse(http.StatusUnsupportedMediaType, "HeaderInvalid", "Content-Type")
		}
	}
	r.body = body
	return nil
}

func tooLarge(w http.ResponseWriter) *Error {
	w.Header().Set("Connection", "close")
	return refuse(http.StatusRequestEntityTooLarge, "PayloadTooLarge")
}

// precondition checks If-Match.
func precondition(hr *http.Request, etag string, match func(tag, etag string) bool) error {
	if list := hr.Header.Values("If-Match"); len(list) > 0 && !matchesETag(list, etag, match) {
		e := refuse(http.StatusPreconditionFailed, "PreconditionFailed")
		e.Header = http.Header{"Etag": {etag}}
		return e
	}
	return nil
}

// same reports whether two tags are of the same content.
func same(tag, etag string) bool { return tag == etag }

// unchanged reports whether two tags are of the same settings: a client that changes some must not undo what another has set, but
// readings that have moved since it looked, as those of a host that starts do all the time, are no reason to refuse it.
func unchanged(tag, etag string) bool {
	i := strings.LastIndexByte(etag, ':')
	return tag == etag || i >= 0 && strings.HasSuffix(tag, etag[i:])
}

// matchesETag reports whether a list of entity tags (RFC 9110 §13.1.1) names this one. Tags are compared weakly: clients drop the W/.
func matchesETag(lists []string, etag string, match func(tag, etag string) bool) bool {
	etag = strings.TrimPrefix(etag, "W/")
	for _, list := range lists {
		for list != "" {
			list = strings.TrimLeft(list, " \t,")
			if strings.HasPrefix(list, "*") {
				return true
			}
			list = strings.TrimPrefix(list, "W/")
			if !strings.HasPrefix(list, `"`) {
				// Not a tag: skip to the next comma. Some clients leave the quotes out.
				tag, rest, _ := strings.Cut(list, ",")
				if match(`"`+strings.TrimSpace(tag)+`"`, etag) {
					return true
				}
				list = rest
				continue
			}
			end := strings.IndexByte(list[1:], '"')
			if end < 0 {
				break
			}
			tag, rest := list[:end+2], list[end+2:]
			before, after, _ := strings.Cut(rest, ",")
			if match(tag, etag) && strings.TrimSpace(before) == "" { // else it is no tag but only begins like one
				return true
			}
			list = after
		}
	}
	return false
}

// acceptable reports whether the Accept headers (RFC 9110 §12.5.1) take a media type.
func acceptable(accept []string, media string) bool {
	if len(accept) == 0 {
		return true
	}
	kind, _, _ := strings.Cut(media, "/")
	any := false
	for _, list := range accept {
		for item := range strings.SplitSeq(list, ",") {
			item, params, _ := strings.Cut(item, ";")
			item = strings.ToLower(strings.TrimSpace(item))
			if item == "" {
				continue
			}
			any = true
			if item != media && item != kind+"/*" && item != "*/*" {
				continue
			}
			if q, ok := strings.CutPrefix(strings.ReplaceAll(params, " ", ""), "q="); ok {
				if f, err := strconv.ParseFloat(q, 64); err == nil && f == 0 {
					continue
				}
			}
			return true
		}
	}
	return !any
}

// writeReply answers with a Reply.
func (s *Service) writeReply(w http.ResponseWriter, r *Request, reply *Reply) error {
	if reply == nil {
		reply = &Reply{}
	}
	if reply.Body == nil {
		return s.writeJSON(w, r, reply, nil, "")
	}
	b, err := json.Marshal(reply.Body)
	if err != nil {
		return fmt.Errorf("encode answer of %s: %w", r.URI, err)
	}
	return s.writeJSON(w, r, reply, b, "")
}

func (s *Service) writeJSON(w http.ResponseWriter, r *Request, reply *Reply, body []byte, etag string) error {
	h := w.Header()
	for k, v := range reply.Header {
		h[http.CanonicalHeaderKey(k)] = v
	}
	if reply.Location != "" {
		h.Set("Location", reply.Location)
	}
	if etag != "" {
		h.Set("ETag", etag)
	}
	status := reply.Status
	switch {
	case status == 0 && body == nil:
		status = http.StatusNoContent
	case status == 0:
		status = http.StatusOK
	}
	if body == nil {
		w.WriteHeader(status)
		return nil
	}
	if r.http.Method != http.MethodGet {
		h.Set("Cache-Control", "no-store")
	}
	h.Set("Content-Type", "application/json;charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	if r.http.Method == http.MethodHead {
		return nil
	}
	_, err := w.Write(body)
	return s.gone(err)
}

func (s *Service) writeDocument(w http.ResponseWriter, hr *http.Request, contentType string, body []byte) error {
	media, _, _ := strings.Cut(contentType, ";")
	if !acceptable(hr.Header.Values("Accept"), media) {
		return refuse(http.StatusNotAcceptable, "HeaderInvalid", "Accept")
	}
	h := w.Header()
	etag := s.etag(body, nil)
	h.Set("ETag", etag)
	if matchesETag(hr.Header.Values("If-None-Match"), etag, same) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	if hr.Method == http.MethodHead {
		return nil
	}
	_, err := w.Write(body)
	return s.gone(err)
}

// writeError answers with a refusal. What is not an *Error is our own trouble: the client learns no more than that.
func (s *Service) writeError(w http.ResponseWriter, hr *http.Request, err error) {
	var e *Error
	switch {
	case errors.As(err, &e):
	case errors.Is(err, context.DeadlineExceeded):
		e = refuse(http.StatusServiceUnavailable, "OperationTimeout")
	case errors.Is(err, ErrNotFound):
		e = refuse(404, "ResourceMissingAtURI", hr.URL.Path)
	default:
		s.log.Error("request failed", "method", hr.Method, "path", hr.URL.Path, "err", err)
		e = refuse(500, "InternalError")
	}
	body, merr := json.Marshal(errorBody(e))
	if merr != nil {
		s.log.Error("encode error", "err", merr)
		http.Error(w, "internal error", 500)
		return
	}
	h := w.Header()
	for k, v := range e.Header {
		h[k] = v
	}
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Type", "application/json;charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(e.Status)
	if hr.Method == http.MethodHead {
		return
	}
	_, err = w.Write(body)
	_ = s.gone(err)
}

// errorBody is a refusal as the specification wants it. With several messages, the code is the general one.
func errorBody(e *Error) schema.Error {
	out := schema.Error{Error: schema.ErrorBody{ExtendedInfo: e.Messages}}
	first := e.Messages[0]
	out.Error.Code, out.Error.Message = first.MessageID, first.Message
	if len(e.Messages) > 1 {
		general := message("GeneralError")
		out.Error.Code, out.Error.Message = general.MessageID, general.Message
	}
	return out
}
