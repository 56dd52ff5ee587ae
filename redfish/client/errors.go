package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Error is a service's refusal.
type Error struct {
	Method, URI string
	Status      int
	// Messages are what the service says, the first being the reason; empty if it did not answer in Redfish's form.
	Messages []schema.Message

	hint string
}

func newError(method, uri string, resp *http.Response) *Error {
	e := &Error{Method: method, URI: uri, Status: resp.StatusCode}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return e
	}
	var body schema.Error
	if json.Unmarshal(b, &body) != nil {
		return e
	}
	e.Messages = body.Error.ExtendedInfo
	if len(e.Messages) == 0 && body.Error.Message != "" {
		e.Messages = []schema.Message{{MessageID: body.Error.Code, Message: body.Error.Message}}
	}
	return e
}

// Error says what was asked, what the service answered, and what can be done about it.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: %d %s", e.Method, e.URI, e.Status, http.StatusText(e.Status))
	for i, m := range e.Messages {
		if i == 3 {
			fmt.Fprintf(&b, " (and %d more)", len(e.Messages)-i)
			break
		}
		sep := ": "
		if i > 0 {
			sep = "; "
		}
		text := m.Message
		if text == "" {
			text = m.MessageID
		}
		b.WriteString(sep + strings.TrimSpace(text))
	}
	if h := e.Hint(); h != "" {
		if !strings.HasSuffix(b.String(), ".") {
			b.WriteByte('.')
		}
		b.WriteString(" Next: " + h)
	}
	return b.String()
}

// Hint returns the next step: the service's own resolution, or what follows from the status.
func (e *Error) Hint() string {
	if e.hint != "" {
		return e.hint
	}
	for _, m := range e.Messages {
		if m.Resolution != "" && m.Resolution != "None." && m.Resolution != "None" {
			return m.Resolution
		}
	}
	switch e.Status {
	case http.StatusUnauthorized:
		return "check the user name and the password"
	case http.StatusForbidden:
		return "use an account with more privileges"
	case http.StatusNotFound:
		return "check the URI, and whether the service has this resource"
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		return "try again later"
	}
	return ""
}

// Has reports whether the service sent this message, named without registry and version: "ResourceNotFound".
func (e *Error) Has(message string) bool {
	for _, m := range e.Messages {
		if isMessage(m.MessageID, message) {
			return true
		}
	}
	return false
}

func (e *Error) arg(message string) string {
	for _, m := range e.Messages {
		if isMessage(m.MessageID, message) && len(m.MessageArgs) > 0 {
			return m.MessageArgs[0]
		}
	}
	return ""
}

func isMessage(id, name string) bool { return id == name || strings.HasSuffix(id, "."+name) }

// PasswordChangeError means that the credentials are good, but that the account may do nothing before its password is changed.
type PasswordChangeError struct {
	User    string
	Account string // URI
}

func (e *PasswordChangeError) Error() string {
	return fmt.Sprintf("the password of %q must be changed before anything else", e.User)
}

// PinError is a server that shows another certificate than the pinned one.
type PinError struct{ Want, Got string }

func (e *PinError) Error() string {
	return fmt.Sprintf("the server's certificate has the SHA-256 fingerprint %s, but %s is pinned", e.Got, e.Want)
}

// explain turns an error of the transport into one that names the next step.
func (c *Client) explain(method, uri string, err error) error {
	var (
		pin       *PinError
		authority x509.UnknownAuthorityError
		name      x509.HostnameError
		record    tls.RecordHeaderError
		dns       *net.DNSError
		op        *net.OpError
	)
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err // it repeats what is said below
	}
	next := ""
	switch {
	case errors.Is(err, context.Canceled):
	case errors.As(err, &pin):
		next = "make sure that this is the right machine; if its certificate was renewed on purpose, pin the new fingerprint"
	case errors.As(err, &authority):
		next = "give the CA that signed the server's certificate, or pin the certificate by its fingerprint"
	case errors.As(err, &name):
		next = "use a name that the certificate is made for, or pin the certificate by its fingerprint"
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		next = "check the port: what answers there does not speak TLS"
	case errors.As(err, &dns):
		next = "check the host's name"
	case errors.As(err, &op) && op.Op == "dial":
		next = "check the address and the port, and that the service runs"
	case errors.Is(err, context.DeadlineExceeded):
		next = "check the network, or allow more time"
	}
	if next == "" {
		return fmt.Errorf("%s %s on %s: %w", method, uri, c.base.Host, err)
	}
	return fmt.Errorf("%s %s on %s: %w. Next: %s", method, uri, c.base.Host, err, next)
}
