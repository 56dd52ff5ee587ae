package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// source answers the questions that an agent and a memory image can both be asked.
type source interface {
	Status(context.Context) (query.Status, error)
	PS(context.Context, query.PSOptions) (query.Processes, error)
	// Top takes two samples, interval apart, or one if the memory does not change.
	Top(ctx context.Context, interval time.Duration) (query.Load, error)
	Dmesg(context.Context, query.DmesgOptions) (query.Log, error)
	List(context.Context, query.Listing, []string) (query.Answer, error)
	// Live tells whether a later question may be answered otherwise.
	Live() bool
	Close() error
}

// open returns what the flags or the current context name.
func (e *env) open(ctx context.Context) (source, error) {
	switch {
	case e.o.rdma != "":
		return e.openRemote(ctx)
	case e.o.image != "" || e.o.mem != "":
		return e.openMemory(ctx)
	default:
		a, err := e.openAgent(ctx)
		if err != nil {
			return nil, err
		}
		return a, nil
	}
}

// memory is a host without an agent: a dump, or the RAM file of a virtual machine.
type memory struct {
	mem  hostmem.Memory
	img  *kernel.Image
	live bool
}

func (e *env) openMemory(ctx context.Context) (source, error) {
	if e.o.image != "" && e.o.mem != "" || e.o.host != "" || e.set["context"] {
		return nil, &usageError{msg: "give one of -host, -context, -image and -mem"}
	}
	var mem hostmem.Memory
	var err error
	name := e.o.image
	if name != "" {
		mem, err = hostmem.OpenImage(name)
	} else {
		name = e.o.mem
		mem, err = openRAM(name, e.o.layout)
	}
	if err != nil {
		return nil, fmt.Errorf("open host memory: %w", err)
	}
	o := kernel.Options{Logger: slog.New(slog.DiscardHandler)}
	if o.Types, err = e.elsewhere(); err != nil {
		mem.Close()
		return nil, err
	}
	if rec, ok := mem.(interface{ Labels() map[string]string }); ok {
		// A recording holds what one attach has read, which began at this note.
		if note, err := strconv.ParseUint(rec.Labels()["note"], 0, 64); err == nil {
			o.Hint.Note, o.NoteOnly = hostmem.PhysAddr(note), true
		}
	}
	img, err := kernel.Open(ctx, mem, o)
	if err != nil {
		mem.Close()
		return nil, &codeError{exitUnsure, fmt.Errorf("find a kernel in %s: %w; is this the memory of a supported Linux kernel, and whole?", name, err)}
	}
	return &memory{mem: mem, img: img, live: e.o.mem != ""}, nil
}

// openRAM opens the RAM file of a virtual machine, which is as large as its RAM.
func openRAM(path, layout string) (hostmem.Memory, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if f, err := os.Open(path); err == nil {
		magic := make([]byte, 4)
		_, err := io.ReadFull(f, magic)
		f.Close()
		if err == nil && string(magic) == "\x7fELF" {
			return nil, &usageError{msg: path + " is an ELF core, not the RAM of a machine byte for byte: say -image " + path}
		}
	}
	size := uint64(st.Size())
	var extents []hostmem.Extent
	switch layout {
	case "q35":
		extents = hostmem.Q35Layout(size)
	case "virt":
		extents = hostmem.VirtLayout(size)
	case "flat":
		extents = []hostmem.Extent{{Range: hostmem.Range{Size: size}}}
	default:
		return nil, &usageError{msg: fmt.Sprintf("-layout: want q35, virt or flat, found %q", layout)}
	}
	return hostmem.OpenRAMFile(path, extents, false)
}

func (m *memory) Live() bool   { return m.live }
func (m *memory) Close() error { return m.mem.Close() }

// sampleGap is the time between the two samples from which a status is judged.
const sampleGap = time.Second

func (m *memory) Status(ctx context.Context) (query.Status, error) {
	before := m.img.View(ctx)
	var after query.View
	if m.live {
		// The pages of the first view must be read before the pause, not after it.
		first, err := freeze(before)
		if err != nil {
			return query.Observe(ctx, m.img.Info(), before, nil), nil
		}
		if err := sleep(ctx, sampleGap); err != nil {
			return query.Status{}, err
		}
		after = m.img.View(ctx)
		s := query.Observe(ctx, m.img.Info(), first, after)
		return s, nil
	}
	return query.Observe(ctx, m.img.Info(), before, nil), nil
}

// frozen is a view whose heartbeat has been taken already.
type frozen struct {
	*kernel.View
	hb kernel.Heartbeat
}

func (f frozen) Heartbeat() (kernel.Heartbeat, error) { return f.hb, nil }

func freeze(v *kernel.View) (query.View, error) {
	hb, err := v.Heartbeat()
	return frozen{v, hb}, err
}

func (m *memory) PS(ctx context.Context, o query.PSOptions) (query.Processes, error) {
	v := m.img.View(ctx)
	defer v.Close() // of top, one after the other
	return query.PS(ctx, v, o)
}

func (m *memory) Top(ctx context.Context, interval time.Duration) (query.Load, error) {
	return top(ctx, m, interval)
}

func (m *memory) Dmesg(ctx context.Context, o query.DmesgOptions) (query.Log, error) {
	return query.Dmesg(ctx, m.img.View(ctx), o)
}

// top compares two samples, or judges one alone if the source does not change.
func top(ctx context.Context, s source, interval time.Duration) (query.Load, error) {
	first, err := s.PS(ctx, query.PSOptions{})
	if err != nil {
		return query.Load{}, err
	}
	if !s.Live() || interval <= 0 {
		return query.Top(nil, first)
	}
	if err := sleep(ctx, interval); err != nil {
		return query.Load{}, err
	}
	second, err := s.PS(ctx, query.PSOptions{})
	if err != nil {
		return query.Load{}, err
	}
	l, err := query.Top(&first, second)
	if err == nil && first.Uptime == second.Uptime && first.Uptime > 0 {
		l.Doubts = append(l.Doubts, "the host's clock did not move between the samples: it stands still, or this memory is a still image")
	}
	return l, err
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// target returns the context that the flags mean, completed by them.
func (e *env) target() (agentAt, error) {
	if e.o.image != "" || e.o.mem != "" {
		return agentAt{}, &usageError{msg: "this verb needs an agent: give -host or -context, not memory"}
	}
	var a agentAt
	switch {
	case e.o.host != "" && e.set["context"]:
		return agentAt{}, &usageError{msg: "give one of -host and -context"}
	case e.o.host != "":
		a.URL = e.o.host
	default:
		path, err := e.contextsPath()
		if err != nil {
			return agentAt{}, err
		}
		c, err := readContexts(path)
		if err != nil {
			return agentAt{}, err
		}
		name := e.o.context
		if name == "" {
			name = c.Current
		}
		if name == "" {
			return agentAt{}, errors.New("no agent chosen: use -host URL, -image FILE or -mem FILE, or make a context with: backdoor login -host URL -context NAME")
		}
		if a, err = c.find(name); err != nil {
			return agentAt{}, err
		}
	}
	if e.o.user != "" && e.o.user != a.User {
		a.User, a.Password, a.PasswordFile, a.Token, a.Session = e.o.user, "", "", "", ""
	}
	if e.o.passwordFile != "" {
		a.Password, a.PasswordFile, a.Token, a.Session = "", e.o.passwordFile, "", ""
	}
	if e.o.ca != "" {
		a.CAFile, a.Fingerprint, a.Insecure = e.o.ca, "", false
	}
	if e.o.fingerprint != "" {
		a.CAFile, a.Fingerprint, a.Insecure = "", e.o.fingerprint, false
	}
	if e.o.insecure {
		a.CAFile, a.Fingerprint, a.Insecure = "", "", true
	}
	if a.User == "" && a.Token == "" {
		a.User = "admin"
	}
	return a, nil
}

func (e *env) contextsPath() (string, error) {
	if e.o.config != "" {
		return e.o.config, nil
	}
	return defaultContextsPath()
}

// client makes a client for an agent. It sends nothing.
func (e *env) client(a agentAt, password string) (*client.Client, error) {
	conf := client.Config{
		URL: a.URL, User: a.User, Password: password, Token: a.Token, SessionURI: a.Session,
		Fingerprint: a.Fingerprint, Insecure: a.Insecure, Timeout: e.o.timeout,
	}
	if conf.Password == "" {
		conf.User = "" // a session alone: without a password there is no logging in again
	}
	if path := cmp.Or(e.o.attested, a.Attested); path != "" {
		want, err := readAttestFile(path)
		if err != nil {
			return nil, fmt.Errorf("what the agent has to prove: %w", err)
		}
		conf.Attestation = &want
	}
	if a.Insecure {
		fmt.Fprintf(e.stderr, "backdoor: warning: the certificate of %s is not checked\n", a.URL)
	}
	if a.CAFile != "" {
		pem, err := os.ReadFile(a.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read certificate authority: %w", err)
		}
		conf.CA = x509.NewCertPool()
		if !conf.CA.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read certificate authority: %s holds no PEM certificate", a.CAFile)
		}
	}
	return client.New(conf)
}

// connect makes a client that can be used, from the session, the stored password, its file, or by asking.
func (e *env) connect(ctx context.Context) (*client.Client, agentAt, error) {
	a, err := e.target()
	if err != nil {
		return nil, a, err
	}
	password, err := e.password(a)
	if err != nil {
		return nil, a, err
	}
	c, err := e.client(a, password)
	return c, a, err
}

// password returns what is stored, or asks. A context with a session needs none.
func (e *env) password(a agentAt) (string, error) {
	switch {
	case a.PasswordFile != "":
		return e.readSecret(a.PasswordFile)
	case a.Password != "":
		return a.Password, nil
	case a.Token != "":
		return "", nil
	}
	return e.askSecret(fmt.Sprintf("Password of %s at %s: ", a.User, a.URL))
}

// explain adds the next step to errors of an agent that the operator can mend.
func (e *env) explain(a agentAt, err error) error {
	if err == nil {
		return nil
	}
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var refused *client.Error
	var change *client.PasswordChangeError
	switch {
	case errors.As(err, &change):
		return &codeError{exitDenied, fmt.Errorf("%w; do that with: %s", err, loginCommand(a))}
	case errors.As(err, &refused) && refused.Status == 401 && a.Token != "" && a.Password == "" && a.PasswordFile == "":
		return &codeError{exitDenied, fmt.Errorf("the session with %s has ended; log in again with: %s", a.URL, loginCommand(a))}
	case errors.As(err, &unknown) || errors.As(err, &name):
		return fmt.Errorf("%w\nThe agent at %s shows a certificate that nothing here vouches for%s.\n"+
			"If its console shows the same SHA-256, use -fingerprint SHA-256 (or log in with it once: %s -fingerprint SHA-256); "+
			"if an authority signed it, use -ca FILE", err, a.URL, seen(err), loginCommand(a))
	}
	return err
}

// seen returns the fingerprint of the certificate in a verification error.
func seen(err error) string {
	var u x509.UnknownAuthorityError
	var h x509.HostnameError
	var cert *x509.Certificate
	if errors.As(err, &u) {
		cert = u.Cert
	} else if errors.As(err, &h) {
		cert = h.Certificate
	}
	if cert == nil {
		return ""
	}
	return ": SHA-256 " + fingerprint(cert)
}

func loginCommand(a agentAt) string {
	if a.Name != "" {
		return "backdoor login -context " + a.Name
	}
	return "backdoor login -host " + a.URL
}

// fingerprint is the SHA-256 of a certificate as agents show it on their consoles.
func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}
