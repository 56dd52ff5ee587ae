package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/internal/durable"
)

// agreementFlags are the flags of the verb agreement.
type agreementFlags struct {
	id, uuid, hostName, owner, key, allow, protect, succeeds, reason string
	monitors, emergencyKeys, memory, rates, values                   list
	detectors                                                        string
	from                                                             string
	read, write, power, twoPersons                                   bool
	valid, lasts                                                     time.Duration
	quorum, emergencyThreshold                                       int
	emergencyAllow                                                   string
	emergencyPower, emergencyWrite                                   bool
	emergencyLongest                                                 time.Duration
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

var agreementVerb = verb{
	name:  "agreement",
	args:  "keygen FILE|new|order KIND FILE|sign FILE|send FILE|verify FILE|show FILE",
	words: []string{"keygen", "new", "order", "sign", "send", "verify", "show"},
	short: "access agreements between a host's owner and its monitors",
	long: `An agent writes to its host only what an agreement permits that the owner and every monitor have signed.

  keygen FILE      make a signing key; the private half goes to FILE, the public half is printed
  new              print an unsigned agreement; parties are named as NAME=PUBLIC-KEY
  order KIND FILE  print an unsigned order about the agreement in FILE: pause, resume or revoke (the owner signs), or
                   break (the keys for emergencies sign)
  sign FILE        add the signature of -key to the agreement or the order in FILE
  send FILE        give the agreement or the order in FILE to an agent, which judges the signatures
  verify FILE      check all signatures with the owner's public key (-owner), as the agent will
  show FILE        tell what the agreement permits

Operators reach the host's memory by themselves as each -memory WHAT=RIGHTS says. Without any they read all RAM and store nothing. RIGHTS are of read,
write and atomic, separated by commas; storing needs -permit-write besides. WHAT is a physical range, or a name that the agent looks up in the host's
memory at each use:

  0x100000+0x1000       a physical range: its address and how many bytes
  all                   all RAM
  kernel-text           the kernel's code
  symbol/jiffies        a variable or function of the kernel; symbol/NAME+SIZE, so many bytes from there on
  process/1000/worker   what is in memory of the processes of a user (its number) and name

An agent locks the first agreement that it is given: until that ends, only its owner's order stops it, and only a successor (new -succeeds)
that its owner and enough of its monitors have signed takes its place. The host can take part: see "backdoor help agree".

  backdoor agreement keygen owner.key
  backdoor agreement new -uuid 1b4e28ba-2fa1-11d2-883f-0016d3cca427 -owner acme=hmr…= -monitor ops=8fq…= \
      -permit-read -permit-write -permit-power -allow kill-process,power-cycle -memory kernel-text=read -valid 2160h > agreement.json
  backdoor agreement sign agreement.json -key owner.key
  backdoor agreement verify agreement.json -owner hmr…=
  backdoor agreement order pause agreement.json -reason "incident 7" > pause.json
  backdoor agreement sign pause.json -key owner.key && backdoor agreement send pause.json`,
	flags: func(fs *flag.FlagSet, o *options) {
		f := &o.agreement
		fs.StringVar(&f.id, "id", "", "`name` of the agreement (default one is made)")
		fs.StringVar(&f.uuid, "uuid", "", "SMBIOS system `UUID` of the host")
		fs.StringVar(&f.hostName, "host-name", "", "`name` of the host, for people")
		fs.StringVar(&f.owner, "owner", "", "owner of the host, as `NAME=KEY`; of verify, KEY")
		fs.Var(&f.monitors, "monitor", "a monitor, as `NAME=KEY`; may be given several times")
		fs.StringVar(&f.key, "key", "", "private key `file` to sign with")
		fs.StringVar(&f.allow, "allow", "", "healing `actions` permitted, separated by commas")
		fs.StringVar(&f.protect, "protect", "", "`users` whose tasks nothing may touch, as 0-99,1000; with a name, as 0/sshd, only those of that name")
		fs.Var(&f.rates, "rate", "how often an action may be begun, as `ACTION=TIMES/TIME`: power-cycle=3/24h; may be given several times (default as often as policy says)")
		fs.Var(&f.values, "value", "what an action may be given that takes a value, as `NAME=MIN..MAX`: kernel.pid_max=32768..4194304; may be given several times (default all that it takes; with one, nothing else)")
		fs.StringVar(&f.detectors, "detectors", "", "`detectors` that may judge the host, separated by commas, as \"backdoor status\" names an agent's (default all)")
		fs.Var(&f.memory, "memory", "memory that operators may reach by themselves, as `WHAT=RIGHTS`; may be given several times")
		fs.BoolVar(&f.read, "permit-read", false, "permit to read the host's memory")
		fs.BoolVar(&f.write, "permit-write", false, "permit to write to the host's memory")
		fs.BoolVar(&f.twoPersons, "two-persons", false, "have each store by address need a second operator's consent")
		fs.BoolVar(&f.power, "permit-power", false, "permit to switch the host's power")
		fs.StringVar(&f.succeeds, "succeeds", "", "agreement `file` whose place the new one is to take while that one holds; or the SHA-256 that an agent whose lock is lost asks for")
		fs.IntVar(&f.quorum, "quorum", 0, "how many `monitors` it takes for a successor, besides the owner (default all)")
		fs.Var(&f.emergencyKeys, "emergency-key", "somebody who may break the glass with others, as `NAME=KEY`; may be given several times")
		fs.IntVar(&f.emergencyThreshold, "emergency-threshold", 2, "how many of the emergency `keys` it takes")
		fs.StringVar(&f.emergencyAllow, "emergency-allow", "", "healing `actions` permitted besides in an emergency, separated by commas")
		fs.BoolVar(&f.emergencyPower, "emergency-power", false, "permit to switch the host's power in an emergency")
		fs.BoolVar(&f.emergencyWrite, "emergency-write", false, "permit to write to the host's memory, anywhere, in an emergency")
		fs.DurationVar(&f.emergencyLongest, "emergency-longest", time.Hour, "longest `time` of an emergency")
		fs.DurationVar(&f.lasts, "for", 0, "how `long` an order lasts (a pause: until it is resumed; break needs it)")
		fs.StringVar(&f.reason, "reason", "", "why an order is given, in `words` for people")
		fs.StringVar(&f.from, "from", "", "`time` from which on the agreement is valid, as 2026-12-24T00:00:00Z (default now)")
		fs.DurationVar(&f.valid, "valid", 90*24*time.Hour, "`time` from then on for which the agreement is valid")
	},
	run: runAgreement,
}

func runAgreement(ctx context.Context, e *env, args []string) (int, error) {
	word, args := args[0], args[1:]
	if word == "new" {
		if err := none("agreement", args); err != nil {
			return 0, err
		}
		a, err := newAgreement(e.o.agreement, time.Now())
		if err != nil {
			return 0, err
		}
		return exitOK, e.json(a)
	}
	if word == "order" {
		if len(args) != 2 {
			return 0, &usageError{verb: "agreement", msg: "agreement order takes what is ordered (pause, resume, revoke, break) and the agreement's file"}
		}
		o, err := newOrder(args[0], args[1], e.o.agreement, time.Now())
		if err != nil {
			return 0, err
		}
		return exitOK, e.json(o)
	}
	if len(args) != 1 {
		return 0, &usageError{verb: "agreement", msg: fmt.Sprintf("agreement %s takes one file", word)}
	}
	path := args[0]
	switch word {
	case "keygen":
		public, err := makeKey(path)
		if err != nil {
			return 0, err
		}
		text, err := public.MarshalText()
		if err != nil {
			return 0, err
		}
		return exitOK, e.answer(map[string]string{"publicKey": string(text), "fingerprint": public.Fingerprint()}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s\n", text)
			return err
		})
	case "sign":
		return e.signAgreement(path)
	case "verify":
		return e.verifyAgreement(path)
	case "send":
		return e.sendAgreement(ctx, path)
	}
	a, err := readAgreement(path)
	if err != nil {
		return 0, err
	}
	return exitOK, e.answer(a, func(w io.Writer) error { return a.WriteText(w) })
}

func newAgreement(f agreementFlags, now time.Time) (*access.Agreement, error) {
	owner, err := party("-owner", f.owner)
	if err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	if f.from != "" {
		if now, err = time.Parse(time.RFC3339, f.from); err != nil {
			return nil, &usageError{verb: "agreement", msg: fmt.Sprintf("-from: %q is no time like 2026-12-24T00:00:00Z", f.from)}
		}
		now = now.UTC().Truncate(time.Second)
	}
	a := &access.Agreement{
		Version: access.Version, ID: f.id, Host: access.Host{UUID: strings.ToLower(f.uuid), Name: f.hostName}, Owner: owner,
		Monitors:  []access.Party{},
		Rights:    access.Rights{Read: f.read, Write: f.write, Power: f.power, TwoPersons: f.twoPersons, Actions: []string{}},
		Protected: []access.Protected{}, Signatures: []access.Signature{},
		ValidFrom: now, ValidUntil: now.Add(f.valid),
	}
	if a.ID == "" {
		a.ID = "agreement-" + strings.ToLower(rand.Text()[:8])
	}
	for _, m := range f.monitors {
		p, err := party("-monitor", m)
		if err != nil {
			return nil, err
		}
		a.Monitors = append(a.Monitors, p)
	}
	for action := range strings.SplitSeq(f.allow, ",") {
		if action = strings.TrimSpace(action); action != "" {
			a.Rights.Actions = append(a.Rights.Actions, action)
		}
	}
	for id := range strings.SplitSeq(f.detectors, ",") {
		if id = strings.TrimSpace(id); id != "" {
			a.Rights.Detectors = append(a.Rights.Detectors, id)
		}
	}
	for _, s := range f.rates {
		r, err := rate(s)
		if err != nil {
			return nil, err
		}
		a.Rights.Rates = append(a.Rights.Rates, r)
	}
	for _, s := range f.values {
		v, err := valueRange(s)
		if err != nil {
			return nil, err
		}
		a.Rights.Values = append(a.Rights.Values, v)
	}
	for users := range strings.SplitSeq(f.protect, ",") {
		if users = strings.TrimSpace(users); users == "" {
			continue
		}
		numbers, comm, named := strings.Cut(users, "/")
		first, last, both := strings.Cut(numbers, "-")
		if !both {
			last = first
		}
		lo, err1 := strconv.ParseUint(first, 10, 32)
		hi, err2 := strconv.ParseUint(last, 10, 32)
		if err := errors.Join(err1, err2); err != nil || lo > hi || named && comm == "" {
			return nil, &usageError{verb: "agreement", msg: fmt.Sprintf("-protect: %q is no range of user numbers like 0-99, nor one with a name like 0/sshd", users)}
		}
		a.Protected = append(a.Protected, access.Protected{FirstUID: uint32(lo), LastUID: uint32(hi), Comm: comm})
	}
	for _, s := range f.memory {
		m, err := memoryRight(s)
		switch {
		case err != nil:
			return nil, err
		case !f.read, (m.Write || m.Atomic) && !f.write:
			return nil, &usageError{verb: "agreement", msg: fmt.Sprintf("-memory %q: it permits nothing without -permit-read, nor storing and swapping without -permit-write", s)}
		}
		a.Rights.Memory = append(a.Rights.Memory, m)
	}
	if err := f.further(a); err != nil {
		return nil, err
	}
	// The form is checked as the agent will check it, only without signatures.
	b, err := json.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("make agreement: %w", err)
	}
	if _, err := access.Parse(bytes.NewReader(b)); err != nil {
		return nil, &usageError{verb: "agreement", msg: err.Error()}
	}
	return a, nil
}

// rate reads ACTION=TIMES/TIME.
func rate(s string) (access.Rate, error) {
	action, often, ok := strings.Cut(s, "=")
	times, within, both := strings.Cut(often, "/")
	n, nerr := strconv.Atoi(times)
	d, derr := time.ParseDuration(within)
	if !ok || !both || nerr != nil || derr != nil || d%time.Second != 0 {
		return access.Rate{}, &usageError{verb: "agreement", msg: fmt.Sprintf("-rate %q: want ACTION=TIMES/TIME in whole seconds, as power-cycle=3/24h", s)}
	}
	return access.Rate{Action: action, Most: n, Within: int(d / time.Second)}, nil
}

// valueRange reads NAME=MIN..MAX.
func valueRange(s string) (access.ValueRange, error) {
	name, bounds, _ := strings.Cut(s, "=")
	lo, hi, ok := strings.Cut(bounds, "..")
	least, err1 := heal.ParseValue(name + "=" + lo)
	most, err2 := heal.ParseValue(name + "=" + hi)
	setting, action, known := heal.SettingOf(name)
	switch {
	case !ok || err1 != nil || err2 != nil:
		return access.ValueRange{}, &usageError{verb: "agreement", msg: fmt.Sprintf("-value %q: want NAME=MIN..MAX, as kernel.pid_max=32768..4194304", s)}
	case !known:
		return access.ValueRange{}, &usageError{verb: "agreement", msg: fmt.Sprintf("-value %q: no action sets %q; \"backdoor help heal\" lists what can be set", s, name)}
	case least.Number > setting.Max || most.Number < setting.Min:
		return access.ValueRange{}, &usageError{verb: "agreement", msg: fmt.Sprintf("-value %q: %s takes %s in any case", s, action, setting)}
	}
	return access.ValueRange{Action: action, Name: name, Min: least.Number, Max: most.Number}, nil
}

// memoryRight reads WHAT=RIGHTS. A process may have = in its name, no right has.
func memoryRight(s string) (m access.Memory, err error) {
	bad := func(format string, args ...any) (access.Memory, error) {
		return m, &usageError{verb: "agreement", msg: fmt.Sprintf("-memory %q: %s", s, fmt.Sprintf(format, args...))}
	}
	cut := strings.LastIndexByte(s, '=')
	if cut < 0 {
		return bad("want WHAT=RIGHTS, as kernel-text=read")
	}
	what, rights := s[:cut], s[cut+1:]
	for r := range strings.SplitSeq(rights, ",") {
		switch strings.TrimSpace(r) {
		case "read":
			m.Read = true
		case "write":
			m.Write = true
		case "atomic":
			m.Atomic = true
		default:
			return bad("%q is no right; there are read, write and atomic", r)
		}
	}
	kind, name, _ := strings.Cut(what, "/")
	switch kind {
	case "all", "kernel-text":
		if what != kind {
			return bad("nothing follows %q", kind)
		}
		m.All, m.KernelText = kind == "all", kind == "kernel-text"
		return m, nil
	case "symbol":
		symbol, size, sized := strings.Cut(name, "+")
		if symbol == "" {
			return bad("want symbol/NAME or symbol/NAME+SIZE")
		}
		m.Symbol = symbol
		if sized {
			if m.Size, err = strconv.ParseUint(size, 0, 64); err != nil || m.Size == 0 {
				return bad("%q is no number of bytes", size)
			}
		}
		return m, nil
	case "process":
		user, comm, ok := strings.Cut(name, "/")
		uid, err := strconv.ParseUint(user, 10, 32)
		if !ok || err != nil {
			return bad("want process/USER-NUMBER/NAME, as process/1000/worker")
		}
		id := uint32(uid)
		m.Process = &access.Process{UID: &id, Comm: comm}
		return m, nil
	}
	start, size, ok := strings.Cut(what, "+")
	m.Start, err = strconv.ParseUint(start, 0, 64)
	var err2 error
	m.Size, err2 = strconv.ParseUint(size, 0, 64)
	if !ok || err != nil || err2 != nil {
		return bad("%q is neither START+SIZE nor all, kernel-text, symbol/NAME or process/USER-NUMBER/NAME", what)
	}
	return m, nil
}

// further adds what an agreement need not have.
func (f agreementFlags) further(a *access.Agreement) error {
	a.Quorum = f.quorum
	if digest, err := hex.DecodeString(f.succeeds); err == nil && len(digest) == sha256.Size {
		a.Succeeds = f.succeeds
	} else if f.succeeds != "" {
		old, err := readAgreement(f.succeeds)
		if err != nil {
			return err
		}
		if a.Succeeds, err = old.Digest(); err != nil {
			return err
		}
	}
	if len(f.emergencyKeys) == 0 {
		return nil
	}
	e := &access.Emergency{Threshold: f.emergencyThreshold, Actions: []string{}, Power: f.emergencyPower, Write: f.emergencyWrite, Longest: int(f.emergencyLongest / time.Second)}
	for _, k := range f.emergencyKeys {
		p, err := party("-emergency-key", k)
		if err != nil {
			return err
		}
		e.Keys = append(e.Keys, p)
	}
	for action := range strings.SplitSeq(f.emergencyAllow, ",") {
		if action = strings.TrimSpace(action); action != "" {
			e.Actions = append(e.Actions, action)
		}
	}
	a.Emergency = e
	return nil
}

// newOrder makes an order about the agreement in a file.
func newOrder(kind, path string, f agreementFlags, now time.Time) (*access.Order, error) {
	a, err := readAgreement(path)
	if err != nil {
		return nil, err
	}
	digest, err := a.Digest()
	if err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	o := &access.Order{
		Version: access.Version, Agreement: digest, Sequence: uint64(now.Unix()), Order: kind, Issued: now, Reason: f.reason, Signatures: []access.Signature{},
	}
	if f.lasts != 0 {
		until := now.Add(f.lasts)
		o.Until = &until
	}
	b, err := json.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("make order: %w", err)
	}
	if _, err := access.ParseOrder(bytes.NewReader(b)); err != nil {
		return nil, &usageError{verb: "agreement", msg: err.Error()}
	}
	return o, nil
}

// document is an agreement or an order: one of the two is not nil.
type document struct {
	agreement *access.Agreement
	order     *access.Order
	bytes     []byte
}

func readDocument(path string) (d document, err error) {
	if d.bytes, err = os.ReadFile(path); err != nil {
		return d, fmt.Errorf("read agreement or order: %w", err)
	}
	var kind struct {
		Order *string `json:"order"`
	}
	if json.Unmarshal(d.bytes, &kind) == nil && kind.Order != nil {
		d.order, err = access.ParseOrder(bytes.NewReader(d.bytes))
	} else {
		d.agreement, err = access.Parse(bytes.NewReader(d.bytes))
	}
	if err != nil {
		return d, fmt.Errorf("read %s: %w", path, err)
	}
	return d, nil
}

// sendAgreement gives an agreement or an order to an agent.
func (e *env) sendAgreement(ctx context.Context, path string) (int, error) {
	d, err := readDocument(path)
	if err != nil {
		return 0, err
	}
	c, at, err := e.connect(ctx)
	if err != nil {
		return 0, err
	}
	defer c.Close(ctx)
	what, send := "order", c.ObeyOrder
	if d.agreement != nil {
		what, send = "agreement", c.OfferAgreement
	}
	if err := send(ctx, d.bytes); err != nil {
		return 0, e.explain(at, fmt.Errorf("send %s %s: %w", what, path, err))
	}
	return exitOK, e.answer(map[string]string{"taken": what}, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "The agent has taken the %s.\n", what)
		return err
	})
}

// party reads NAME=KEY.
func party(name, s string) (access.Party, error) {
	who, key, ok := strings.Cut(s, "=")
	p := access.Party{Name: who}
	if !ok || who == "" {
		return p, &usageError{verb: "agreement", msg: fmt.Sprintf("%s: want NAME=KEY with the public key that keygen printed, found %q", name, s)}
	}
	if err := p.Key.UnmarshalText([]byte(key)); err != nil {
		return p, &usageError{verb: "agreement", msg: fmt.Sprintf("%s %s: %v", name, who, err)}
	}
	return p, nil
}

// makeKey writes a new private key to a file that must not exist yet, and returns the public half.
func makeKey(path string) (access.Key, error) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return access.Key(public), nil
}

func readKey(path string) (ed25519.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	b, _ := pem.Decode(data)
	if b == nil {
		return nil, fmt.Errorf("read key: %s holds no PEM private key; make one with: backdoor agreement keygen FILE", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read key: %s: %w", path, err)
	}
	private, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("read key: %s holds a key of another kind than Ed25519", path)
	}
	return private, nil
}

func readAgreement(path string) (*access.Agreement, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read agreement: %w", err)
	}
	defer f.Close()
	a, err := access.Parse(f)
	if err != nil {
		return nil, fmt.Errorf("read agreement %s: %w", path, err)
	}
	return a, nil
}

func (e *env) signAgreement(path string) (int, error) {
	if e.o.agreement.key == "" {
		return 0, &usageError{verb: "agreement", msg: "agreement sign needs -key FILE"}
	}
	d, err := readDocument(path)
	if err != nil {
		return 0, err
	}
	key, err := readKey(e.o.agreement.key)
	if err != nil {
		return 0, err
	}
	var signed any = d.order
	if d.order != nil {
		err = d.order.Sign(key)
	} else {
		signed, err = d.agreement, d.agreement.Sign(key)
	}
	if err != nil {
		return 0, fmt.Errorf("sign %s: %w", path, err)
	}
	b, err := json.MarshalIndent(signed, "", "  ")
	if err != nil {
		return 0, fmt.Errorf("sign %s: %w", path, err)
	}
	if err := durable.WriteFile(path, append(b, '\n'), 0o644); err != nil {
		return 0, fmt.Errorf("sign %s: %w", path, err)
	}
	missing, n := []string{}, 0
	if d.order != nil {
		n = len(d.order.Signatures)
	} else {
		missing, n = d.agreement.Unsigned(), len(d.agreement.Signatures)+len(d.agreement.Endorsements)
	}
	return exitOK, e.answer(map[string]any{"signatures": n, "missing": missing}, func(w io.Writer) error {
		l := &lines{w: w}
		l.printf("Signed %s.\n", path)
		for _, m := range missing {
			l.printf("Still missing: the signature of %s\n", query.Clean(m))
		}
		return l.err
	})
}

func (e *env) verifyAgreement(path string) (int, error) {
	_, text, ok := strings.Cut(e.o.agreement.owner, "=")
	if !ok || text == "" { // the key alone; base64 ends in "="
		text = e.o.agreement.owner
	}
	var owner access.Key
	if err := owner.UnmarshalText([]byte(e.o.agreement.owner)); err != nil {
		if err2 := owner.UnmarshalText([]byte(text)); err2 != nil {
			return 0, &usageError{verb: "agreement", msg: fmt.Sprintf("-owner: want the owner's public key: %v", err)}
		}
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("verify agreement: %w", err)
	}
	defer f.Close()
	a, err := access.Load(f, ed25519.PublicKey(owner))
	if err != nil {
		return 0, &codeError{exitDenied, fmt.Errorf("verify agreement %s: %w", path, err)}
	}
	if now := time.Now(); now.Before(a.ValidFrom) || !now.Before(a.ValidUntil) {
		return 0, &codeError{exitDenied, fmt.Errorf("verify agreement %s: the signatures are right, but it is valid only from %s to %s",
			path, a.ValidFrom.UTC().Format(time.RFC3339), a.ValidUntil.UTC().Format(time.RFC3339))}
	}
	return exitOK, e.answer(a, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s is signed by its owner and every monitor, and valid until %s.\n", query.Clean(a.ID), a.ValidUntil.UTC().Format(time.RFC3339))
		return err
	})
}
