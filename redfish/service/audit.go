package service

import (
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"
)

// AuditRecord says who changed what, or tried to, and how that ended.
type AuditRecord struct {
	Time    time.Time      `json:"time"`
	User    string         `json:"user"`
	Address string         `json:"address"` // IP address
	Session string         `json:"session,omitempty"`
	What    string         `json:"what"` // POST, PATCH, DELETE, the name of an action, or "lock out"
	URI     string         `json:"uri"`
	Change  map[string]any `json:"change,omitempty"` // what was sent, without secrets
	Status  int            `json:"status"`           // of HTTP; below 400 the change was made
	Error   string         `json:"error,omitempty"`
}

// audit narrates a change in the log and keeps it in the audit trail: who, what, and how it ended.
func (s *Service) audit(r *Request, what string, err error) {
	rec := AuditRecord{
		Time: s.now(), User: r.Caller.User, Address: r.Caller.Address, Session: r.Caller.Session, What: what, URI: r.URI, Status: http.StatusOK,
		Change: redact(r.body, s.limits.Depth),
	}
	if err != nil {
		var e *Error
		rec.Status, rec.Error = http.StatusInternalServerError, err.Error()
		if errors.As(err, &e) {
			rec.Status = e.Status
		} else if errors.Is(err, ErrNotFound) {
			rec.Status = http.StatusNotFound
		}
		s.log.Warn("refused", "what", what, "uri", r.URI, "user", r.Caller.User, "from", r.Caller.Address, "err", err)
	} else {
		s.log.Info("done", "what", what, "uri", r.URI, "user", r.Caller.User, "from", r.Caller.Address)
	}
	s.keep(rec)
}

// keep appends to the audit trail. What cannot be kept is no reason to deny an operator the machine, but is said loudly.
func (s *Service) keep(rec AuditRecord) {
	if s.o.Audit == nil {
		return
	}
	s.auditing.Lock()
	defer s.auditing.Unlock()
	if err := s.o.Audit(rec); err != nil {
		s.log.Error("the audit trail is not kept", "what", rec.What, "uri", rec.URI, "user", rec.User, "err", err)
	}
}

// secrets are the properties whose values nobody may read again.
var secrets = []string{"Password", "HttpHeaders", "CertificateString", "Token", "Headers"}

const redacted = "******"

// redact returns the properties of a request's body by their paths, with secrets and long values left out.
func redact(body []byte, depth int) map[string]any {
	if len(body) == 0 {
		return nil
	}
	fields, e := parseBody(body, depth, func(string) bool { return false })
	if e != nil {
		return nil
	}
	out := map[string]any{}
	for _, f := range fields {
		const enough = 50
		if len(out) == enough {
			break
		}
		name := f.name
		if slices.ContainsFunc(secrets, func(s string) bool { return strings.Contains(name, s) }) {
			out[clip(name)] = redacted
			continue
		}
		if b, err := json.Marshal(f.value); err != nil || len(b) > 256 {
			out[clip(name)] = "…"
			continue
		}
		out[clip(name)] = f.value
	}
	return out
}
