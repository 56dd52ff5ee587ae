// Package client speaks to a Redfish service: typed resources, sessions that renew themselves, tasks with progress, and
// errors that say what the service said and what to do next.
//
// The server is trusted by a CA, by a pinned certificate, or, only if the caller says so, not checked at all.
package client

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Config says where a service is and how to be let in.
type Config struct {
	// URL of the service, such as "https://10.0.0.5" or "https://[::1]:8443". The path is ignored; "https://" may be left out.
	URL      string
	User     string
	Password string
	// Token and SessionURI resume a session that an earlier client has opened (see Session); User and Password, if given,
	// are used when it has ended.
	Token, SessionURI string
	// Basic uses HTTP basic authentication instead of a session.
	Basic bool

	// CA verifies the server's certificate; nil means the system's pool.
	CA *x509.CertPool
	// Fingerprint pins the server's certificate by the SHA-256 of its DER form, in hexadecimal, with or without colons. It
	// replaces CA and the check of the name.
	Fingerprint string
	// Insecure accepts any certificate.
	Insecure bool

	// Attestation is what the service has to prove before any request but those of the proof itself, and logging in, is sent; nil asks for
	// nothing.
	Attestation *Attestation

	// Timeout of one request; 0 means 30 s. The context given to a call can make it shorter.
	Timeout time.Duration
}

// maxBody bounds an answer that is decoded.
const maxBody = 16 << 20

// Client is a client of one service. It is safe for concurrent use.
type Client struct {
	base    *url.URL
	o       Config
	http    *http.Client
	timeout time.Duration
	proof   sync.Mutex // held while the service proves what it runs
	// attested is the key of the agent that has proven what it runs: no other one is spoken to then. Handshakes read it, also while mu is held.
	attested atomic.Pointer[attest.Digest]

	mu      sync.Mutex // guards what follows
	token   string
	session string // URI
}

// New checks the configuration; it sends nothing.
func New(o Config) (*Client, error) {
	if o.URL != "" && !strings.Contains(o.URL, "://") {
		o.URL = "https://" + o.URL
	}
	base, err := url.Parse(o.URL)
	if err != nil {
		return nil, fmt.Errorf("parse service URL: %w", err)
	}
	if base.Host == "" || base.Scheme != "https" {
		return nil, fmt.Errorf("service URL %q: want https://host[:port]", o.URL)
	}
	base = &url.URL{Scheme: base.Scheme, Host: base.Host}
	conf := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: o.CA, InsecureSkipVerify: o.Insecure}
	var pinned func(tls.ConnectionState) error
	if o.Fingerprint != "" {
		pin, err := hex.DecodeString(strings.ReplaceAll(o.Fingerprint, ":", ""))
		if err != nil || len(pin) != sha256.Size {
			return nil, errors.New("fingerprint: want the 64 hexadecimal digits of a SHA-256")
		}
		conf.InsecureSkipVerify = true // replaced by the pin
		pinned = func(state tls.ConnectionState) error {
			sum := sha256.Sum256(state.PeerCertificates[0].Raw)
			if !bytes.Equal(sum[:], pin) {
				return &PinError{Want: hex.EncodeToString(pin), Got: hex.EncodeToString(sum[:])}
			}
			return nil
		}
	}
	c := &Client{base: base, o: o, timeout: o.Timeout, token: o.Token, session: o.SessionURI}
	if c.timeout == 0 {
		c.timeout = 30 * time.Second
	}
	conf.VerifyConnection = func(state tls.ConnectionState) error {
		if pinned != nil {
			if err := pinned(state); err != nil {
				return err
			}
		}
		return c.sameAsAttested(state)
	}
	c.http = &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     conf,
			MaxIdleConnsPerHost: 8,
			IdleConnTimeout:     60 * time.Second,
			ForceAttemptHTTP2:   true,
		},
		// A Redfish service has no business sending its clients, and their credentials, elsewhere.
		CheckRedirect: func(r *http.Request, _ []*http.Request) error {
			if r.URL.Host != base.Host || r.URL.Scheme != base.Scheme {
				return fmt.Errorf("service redirects to another host: %s", r.URL.Host)
			}
			return nil
		},
	}
	return c, nil
}

// Login opens a session. Calls do that by themselves; Login tells early whether the credentials are good.
// A *PasswordChangeError means that they are, but that ChangePassword must come before anything else.
func (c *Client) Login(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.login(ctx)
}

// login opens a session. The caller holds mu.
func (c *Client) login(ctx context.Context) error {
	if c.o.Basic {
		return nil
	}
	c.token, c.session = "", ""
	body, err := json.Marshal(map[string]string{"UserName": c.o.User, "Password": c.o.Password})
	if err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	const uri = "/redfish/v1/SessionService/Sessions"
	var session schema.Session
	resp, err := c.once(ctx, http.MethodPost, uri, body, nil, &session)
	if err != nil {
		var e *Error
		if errors.As(err, &e) && e.Status == http.StatusUnauthorized {
			e.hint = "check the user name and the password"
		}
		return fmt.Errorf("log in as %q: %w", c.o.User, err)
	}
	c.token = resp.Header.Get("X-Auth-Token")
	c.session = session.ODataID
	if c.token == "" {
		return fmt.Errorf("log in as %q: the service sent no X-Auth-Token", c.o.User)
	}
	for _, m := range session.ExtendedInfo {
		if isMessage(m.MessageID, "PasswordChangeRequired") && len(m.MessageArgs) > 0 {
			return &PasswordChangeError{User: c.o.User, Account: m.MessageArgs[0]}
		}
	}
	return nil
}

// ChangePassword sets a new password for the client's own user, and uses it from then on. It is the only thing that an account
// whose password must be changed may do.
func (c *Client) ChangePassword(ctx context.Context, to string) error {
	account, err := c.ownAccount(ctx)
	if err != nil {
		return fmt.Errorf("change password: %w", err)
	}
	if err := c.Patch(ctx, account, map[string]string{"Password": to}, nil); err != nil {
		return fmt.Errorf("change password: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.o.Password = to
	return nil
}

// ownAccount returns the URI of the client's own account.
func (c *Client) ownAccount(ctx context.Context) (string, error) {
	var change *PasswordChangeError
	if err := c.Login(ctx); errors.As(err, &change) {
		return change.Account, nil
	} else if err != nil {
		return "", err
	}
	for a, err := range Members[schema.ManagerAccount](ctx, c, "/redfish/v1/AccountService/Accounts") {
		switch {
		case errors.As(err, &change): // with basic authentication there was no login to say so
			return change.Account, nil
		case err != nil:
			return "", fmt.Errorf("find own account: %w", err)
		case a.UserName == c.o.User:
			return a.ODataID, nil
		}
	}
	return "", fmt.Errorf("find own account: the service shows no account of %q", c.o.User)
}

// Session returns the token and the URI of the open session, for a later client to resume; empty if there is none.
func (c *Client) Session() (token, uri string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.token, c.session
}

// Close ends the session. The client can be used again afterwards.
func (c *Client) Close(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.http.CloseIdleConnections()
	if c.token == "" {
		return nil
	}
	_, err := c.once(ctx, http.MethodDelete, c.session, nil, http.Header{"X-Auth-Token": {c.token}}, nil)
	c.token, c.session = "", ""
	var e *Error
	if errors.As(err, &e) && (e.Status == http.StatusUnauthorized || e.Status == http.StatusNotFound) {
		return nil // it has ended by itself
	}
	if err != nil {
		return fmt.Errorf("log out: %w", err)
	}
	return nil
}

// Response is what is left of an answer when its body is decoded.
type Response struct {
	Status   int
	Location string // URI of the new resource or of the task monitor
	ETag     string
	Header   http.Header
	// PeerKey is the SHA-256 of the SubjectPublicKeyInfo of the key that the service showed on the connection.
	PeerKey attest.Digest
}

// Get reads the resource at uri, which may have query options, into out, a pointer to a struct.
func (c *Client) Get(ctx context.Context, uri string, out any) error {
	_, err := c.Do(ctx, http.MethodGet, uri, nil, out)
	return err
}

// Patch changes the resource at uri. out, if not nil, receives the changed resource.
func (c *Client) Patch(ctx context.Context, uri string, in, out any) error {
	_, err := c.Do(ctx, http.MethodPatch, uri, in, out)
	return err
}

// Post creates a member of a collection or runs an action. out, if not nil, receives the body of the answer.
func (c *Client) Post(ctx context.Context, uri string, in, out any) (*Response, error) {
	return c.Do(ctx, http.MethodPost, uri, in, out)
}

// Delete removes the resource at uri.
func (c *Client) Delete(ctx context.Context, uri string) error {
	_, err := c.Do(ctx, http.MethodDelete, uri, nil, nil)
	return err
}

// Do sends one request, in JSON, and decodes the answer into out, if not nil. It logs in first if there is no session, and once
// again if the session has ended meanwhile. A status of 400 or more is an *Error.
func (c *Client) Do(ctx context.Context, method, uri string, in, out any) (*Response, error) {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return nil, fmt.Errorf("%s %s: %w", method, uri, err)
		}
	} else if method == http.MethodPost {
		body = []byte("{}")
	}
	for attempt := 0; ; attempt++ {
		header, token, err := c.authenticate(ctx)
		if err != nil {
			return nil, err
		}
		resp, err := c.once(ctx, method, uri, body, header, out)
		if err == nil {
			return resp, nil
		}
		var e *Error
		if errors.As(err, &e) && e.Status == http.StatusUnauthorized && token != "" && attempt == 0 {
			c.forget(token)
			continue
		}
		if errors.As(err, &e) && e.Has("PasswordChangeRequired") {
			return nil, &PasswordChangeError{User: c.o.User, Account: e.arg("PasswordChangeRequired")}
		}
		return nil, err
	}
}

// authenticate returns the header that lets a request in. A password that must be changed is not its concern: the service
// refuses what is not allowed then.
func (c *Client) authenticate(ctx context.Context) (h http.Header, token string, err error) {
	if err := c.believe(ctx); err != nil {
		return nil, "", err
	}
	h = http.Header{}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.o.User == "" && c.token == "" {
		return h, "", nil
	}
	if c.o.Basic {
		r := http.Request{Header: h}
		r.SetBasicAuth(c.o.User, c.o.Password)
		return h, "", nil
	}
	if c.token == "" {
		var change *PasswordChangeError
		if err := c.login(ctx); err != nil && !errors.As(err, &change) {
			return nil, "", err
		}
	}
	h.Set("X-Auth-Token", c.token)
	return h, c.token, nil
}

// forget drops a token that the service no longer takes, unless somebody has renewed it already.
func (c *Client) forget(token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token == token {
		c.token = ""
	}
}

// open sends one request and returns the answer if its status is below 400. The caller closes the body.
func (c *Client) open(ctx context.Context, method, uri string, body []byte, header http.Header) (*http.Response, error) {
	ref, err := url.Parse(uri)
	if err != nil || ref.Host != "" || !strings.HasPrefix(ref.Path, "/") {
		return nil, fmt.Errorf("%s %q: want a path on the service", method, uri)
	}
	var r io.Reader
	if body != nil {
		r = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base.ResolveReference(ref).String(), r)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, uri, err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("OData-Version", "4.0")
	if req.Header.Get("Accept") == "" {
		req.Header.Set("Accept", "application/json")
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(method, uri, err)
	}
	if resp.StatusCode >= 400 {
		defer resp.Body.Close()
		return nil, newError(method, uri, resp)
	}
	return resp, nil
}

func (c *Client) once(ctx context.Context, method, uri string, body []byte, header http.Header, out any) (*Response, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.open(ctx, method, uri, body, header)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err != nil {
		return nil, fmt.Errorf("%s %s: read answer: %w", method, uri, err)
	}
	if len(b) > maxBody {
		return nil, fmt.Errorf("%s %s: the answer is longer than %d MiB", method, uri, maxBody>>20)
	}
	if out != nil && len(b) > 0 {
		if err := json.Unmarshal(b, out); err != nil {
			return nil, fmt.Errorf("%s %s: decode answer: %w", method, uri, err)
		}
	}
	r := &Response{Status: resp.StatusCode, Location: location(resp), ETag: resp.Header.Get("ETag"), Header: resp.Header}
	if resp.TLS != nil && len(resp.TLS.PeerCertificates) > 0 {
		r.PeerKey = spki(resp.TLS.PeerCertificates[0])
	}
	return r, nil
}

// location returns the path of the Location header: services give a path or a whole URL.
func location(resp *http.Response) string {
	u, err := url.Parse(resp.Header.Get("Location"))
	if err != nil || u.Path == "" {
		return ""
	}
	return u.RequestURI()
}

// Members yields the members of a collection, page after page. T is a resource struct, such as schema.LogEntry; members that
// the service gives as references only are read one by one.
func Members[T any](ctx context.Context, c *Client, uri string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		seen := map[string]bool{}
		for uri != "" {
			if seen[uri] {
				yield(none, fmt.Errorf("GET %s: the pages of the collection go in a circle", uri))
				return
			}
			seen[uri] = true
			var page schema.Collection
			if err := c.Get(ctx, uri, &page); err != nil {
				yield(none, err)
				return
			}
			for _, raw := range page.Members {
				v, err := member[T](ctx, c, raw)
				if !yield(v, err) || err != nil {
					return
				}
			}
			uri = page.NextLink
		}
	}
}

func member[T any](ctx context.Context, c *Client, raw json.RawMessage) (v T, err error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return v, fmt.Errorf("decode member: %w", err)
	}
	if len(fields) == 1 && fields["@odata.id"] != nil {
		var link schema.Link
		if err := json.Unmarshal(raw, &link); err != nil {
			return v, fmt.Errorf("decode member: %w", err)
		}
		return v, c.Get(ctx, link.ID, &v)
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, fmt.Errorf("decode member: %w", err)
	}
	return v, nil
}
