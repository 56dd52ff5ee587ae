package access

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// WriteText tells people what the agreement permits. What others may have chosen is quoted, so that it cannot steer a terminal.
func (a *Agreement) WriteText(w io.Writer) error {
	var b strings.Builder
	line := func(what, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s"+format+"\n", append([]any{what}, args...)...)
	}
	word := map[bool]string{true: "yes", false: "no"}
	line("agreement", "%s", a.ID)
	line("host", "%s %q", a.Host.UUID, a.Host.Name)
	for _, s := range a.signers() {
		line(s.role, "%q, key %s", s.Name, s.Key.Fingerprint())
	}
	line("valid", "%s to %s", a.ValidFrom.UTC().Format(time.RFC3339), a.ValidUntil.UTC().Format(time.RFC3339))
	line("permits", "read %s, write %s, power %s", word[a.Rights.Read], word[a.Rights.Write], word[a.Rights.Power])
	line("actions", "%s", strings.Join(a.Rights.Actions, ", "))
	for _, r := range a.Rights.Rates {
		line("rate", "%s %d times within %v", r.Action, r.Most, time.Duration(r.Within)*time.Second)
	}
	for _, v := range a.Rights.Values {
		line("value", "%s %s=%d..%d", v.Action, v.Name, v.Min, v.Max)
	}
	if a.Rights.Detectors != nil {
		line("detectors", "%s", strings.Join(a.Rights.Detectors, ", "))
	}
	for _, m := range a.Rights.Memory {
		what := m.Names()
		if what == "" {
			what = fmt.Sprintf("%#x to %#x", m.Start, m.Start+m.Size-1)
		}
		line("memory", "%s: read %s, write %s, atomic %s", what, word[m.Read], word[m.Write], word[m.Atomic])
	}
	if a.Rights.TwoPersons {
		line("two persons", "for each store by address")
	}
	for _, p := range a.Protected {
		line("protected", "users %d to %d %q", p.FirstUID, p.LastUID, p.Comm)
	}
	if e := a.Emergency; e != nil {
		line("emergency", "%d of %d keys, for %v at most: write %s, power %s, actions %s", e.Threshold, len(e.Keys), time.Duration(e.Longest)*time.Second,
			word[e.Write], word[e.Power], strings.Join(e.Actions, ", "))
	}
	if a.Succeeds != "" {
		line("succeeds", "%s, with %d endorsements", a.Succeeds, len(a.Endorsements))
	}
	if digest, err := a.Digest(); err == nil {
		line("digest", "%s", digest)
	}
	for _, m := range a.Unsigned() {
		line("UNSIGNED", "by %s", m)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
