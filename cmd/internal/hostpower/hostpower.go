// Package hostpower switches the host's power through its service processor (BMC) with bmclib: by Redfish or, if that fails and
// an address for it is given, by IPMI over LAN+ with the program ipmitool.
//
// The ways are tried in turn, each with a timeout of its own, and the error names what became of each. A way that could not be
// opened is tried last for a minute. An order that the BMC has accepted is given a second time, by the next way, only if that
// does no harm: on and off are, a restart or an NMI is not.
//
// It is bmclib behind a typed, honest door. Of bmclib's providers only gofish, the generic Redfish client, and ipmitool are
// used: the others probe the BMC with vendors' logins. What bmclib has no word for (the reset types, media, the whole boot
// override) goes by the project's own Redfish client; see machine.go. What else it takes care of, all seen with bmclib 2.3.5:
//
//   - bmclib does not verify certificates unless told to. Here the BMC must prove itself by a CA or a pinned certificate.
//
//   - bmclib's "soft" reports a failure when the BMC has accepted the order. The outcome is taken from the provider's error.
//
//   - bmclib's "reset" asks for PowerCycle and, refused, waits nine seconds for a graceful shutdown and reports success
//     although a crashed host is still up. It is not used.
//
//   - gofish ignores the context. Here the connections die with it.
//
//   - Power states are free text. Here they are on, off, paused or unknown, and unknown is never taken for another.
//
//   - The ipmitool provider is left out without a word where there is no such program. Here that is an error.
//
// Each order opens its own session and ends it: orders are rare, and BMCs have few sessions.
package hostpower

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/bmc-toolbox/bmclib/v2"
	"github.com/go-logr/logr"

	"github.com/backdoor-rhs/backdoor/agent/heal"
)

// The power states.
const (
	On      = "on"
	Off     = "off"
	Paused  = "paused"  // the CPUs stand still, on an order, and can go on
	Unknown = "unknown" // powering up, powering down, or what else a BMC may say
)

// ErrState means that the host's power state does not permit the order, or did not come about in time.
var ErrState = errors.New("unexpected power state")

// Options say which BMC it is and how it proves that it is that one.
type Options struct {
	URL      string // https://host[:port]; empty if only IPMI is to be used
	Username string
	Password string
	// IPMI is the BMC's address for IPMI, host[:port]; empty means that it is not used. The port is 623 by default. Username and
	// Password are the same. IPMI proves the BMC's identity no better than the password's secrecy does.
	IPMI string
	// Roots verify the BMC's certificate; nil means the system's roots.
	Roots *x509.CertPool
	// Pin, if not empty, is the SHA-256 of the BMC's certificate in hexadecimal; then its names and its issuer do not matter.
	Pin string
	// Timeout bounds one order on one way, with the waiting for its effect; zero means 30 s.
	Timeout time.Duration
	// OpenTimeout bounds how long a way may take to open; zero means 10 s, or Timeout if that is less.
	OpenTimeout time.Duration
	// OffOn makes Cycle take the power away and give it back. Otherwise the BMC is told to restart the host by a single
	// order, which is also right for an agent that loses its own power with the host's.
	OffOn bool
	// Hold is how long the power stays off in a Cycle with OffOn; zero means 2 s.
	Hold   time.Duration
	Logger *slog.Logger
}

// Client is the host's power controller. It is safe for concurrent use; orders are given one at a time.
type Client struct {
	o          Options
	host, port string
	ipmiHost   string
	ipmiPort   string
	tls        *tls.Config
	poll       time.Duration

	mu     sync.Mutex           // held during an order
	failed map[string]time.Time // by way, when it could last not be opened; guarded by mu
}

var _ heal.Power = (*Client)(nil)

// New checks the options. It does not talk to the BMC.
func New(o Options) (*Client, error) {
	u, err := url.Parse(o.URL)
	if err != nil {
		return nil, fmt.Errorf("host BMC: %w", err)
	}
	if (u.Scheme != "https" || u.Hostname() == "") && (o.URL != "" || o.IPMI == "") {
		return nil, fmt.Errorf("host BMC: want https://host or https://host:port, found %q", o.URL)
	}
	c := &Client{o: o, host: u.Hostname(), port: u.Port(), poll: 250 * time.Millisecond, failed: make(map[string]time.Time)}
	if o.IPMI != "" {
		if c.ipmiHost, c.ipmiPort, err = net.SplitHostPort(o.IPMI); err != nil {
			c.ipmiHost, c.ipmiPort = strings.Trim(o.IPMI, "[]"), "623"
		}
		if c.ipmiHost == "" || c.ipmiPort == "" {
			return nil, fmt.Errorf("host BMC: want host or host:port for IPMI, found %q", o.IPMI)
		}
	}
	if strings.Contains(c.host, ":") {
		c.host = "[" + c.host + "]"
	}
	if c.port == "" {
		c.port = "443"
	}
	if c.o.Timeout == 0 {
		c.o.Timeout = 30 * time.Second
	}
	if c.o.OpenTimeout == 0 {
		c.o.OpenTimeout = min(10*time.Second, c.o.Timeout)
	}
	if c.o.Hold == 0 {
		c.o.Hold = 2 * time.Second
	}
	if c.o.Logger == nil {
		c.o.Logger = slog.New(slog.DiscardHandler)
	}
	c.tls = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: o.Roots}
	if o.Pin != "" {
		pin, err := hex.DecodeString(strings.ReplaceAll(o.Pin, ":", ""))
		if err != nil || len(pin) != sha256.Size {
			return nil, fmt.Errorf("host BMC: the certificate's SHA-256 must be %d bytes in hexadecimal", sha256.Size)
		}
		// Verification is not skipped but replaced: by the exact certificate.
		c.tls.InsecureSkipVerify = true
		c.tls.VerifyConnection = func(s tls.ConnectionState) error {
			found := sha256.Sum256(s.PeerCertificates[0].Raw)
			if subtle.ConstantTimeCompare(found[:], pin) != 1 {
				return fmt.Errorf("the BMC's certificate has SHA-256 %x, not the pinned one", found)
			}
			return nil
		}
	}
	return c, nil
}

// State returns On, Off, Paused or Unknown.
func (c *Client) State(ctx context.Context) (string, error) {
	state := Unknown
	err := c.do(ctx, "read power state", func(ctx context.Context, b *bmclib.Client) error {
		var err error
		state, err = power(ctx, b)
		return err
	})
	return state, err
}

// On switches the host on and returns when the BMC says that it is.
func (c *Client) On(ctx context.Context) error {
	return c.do(ctx, "power on", func(ctx context.Context, b *bmclib.Client) error {
		return c.set(ctx, b, "on", On)
	})
}

// Off takes the host's power away at once and returns when the BMC says that it is gone.
func (c *Client) Off(ctx context.Context) error {
	return c.do(ctx, "power off", func(ctx context.Context, b *bmclib.Client) error {
		return c.set(ctx, b, "off", Off)
	})
}

// Cycle restarts the host at once, whatever state it is in, and returns when the BMC says that it is on.
func (c *Client) Cycle(ctx context.Context) error {
	return c.do(ctx, "power-cycle", func(ctx context.Context, b *bmclib.Client) error {
		state, err := power(ctx, b)
		if err != nil {
			return err
		}
		if state == Off {
			return c.set(ctx, b, "on", On)
		}
		if !c.o.OffOn {
			return c.set(ctx, b, "cycle", On)
		}
		if err := c.set(ctx, b, "off", Off); err != nil {
			return err
		}
		if err := sleep(ctx, c.o.Hold); err != nil {
			return &acceptedError{fmt.Errorf("the host is off and has not been switched on again: %w", err)}
		}
		if err := c.set(ctx, b, "on", On); err != nil {
			return fmt.Errorf("the host is off and could not be switched on again: %w", err)
		}
		return nil
	})
}

// NMI sends a non-maskable interrupt to the host's CPUs, which makes most kernels write a crash dump or panic.
func (c *Client) NMI(ctx context.Context) error {
	return c.do(ctx, "send NMI", func(ctx context.Context, b *bmclib.Client) error {
		return b.SendNMI(ctx)
	})
}

// GracefulShutdown asks the host's operating system to power off. It does not wait: a host that is ill may never do so.
func (c *Client) GracefulShutdown(ctx context.Context) error {
	return c.do(ctx, "shut down", func(ctx context.Context, b *bmclib.Client) error {
		return c.set(ctx, b, "soft", "")
	})
}

// set gives an order and, if want is not empty, waits until the BMC reports that state.
func (c *Client) set(ctx context.Context, b *bmclib.Client, order, want string) error {
	_, err := b.SetPowerState(ctx, order)
	// SystemPowerOff of bmclib returns (false, nil) after the BMC has accepted; only the provider's own error counts.
	if err != nil && (order != "soft" || len(b.GetMetadata().FailedProviderDetail) > 0 || ctx.Err() != nil) {
		return fmt.Errorf("order %q: %w", order, err)
	}
	c.o.Logger.Info("host BMC accepted a power order", "order", order)
	last := Unknown
	for want != "" {
		state, err := power(ctx, b)
		if err == nil && state == want {
			return nil
		}
		if err == nil {
			last = state
		}
		if serr := sleep(ctx, c.poll); serr != nil {
			err := fmt.Errorf("order %q was accepted: wait for power %q: %w: the BMC last said %q", order, want, ErrState, last)
			if order == "on" || order == "off" {
				return err // giving it again does no harm
			}
			return &acceptedError{err}
		}
	}
	return nil
}

// power reads the state through an open session.
func power(ctx context.Context, b *bmclib.Client) (string, error) {
	s, err := b.GetPowerState(ctx)
	if err != nil {
		return Unknown, fmt.Errorf("read power state: %w", err)
	}
	return normal(s), nil
}

// normal maps the ways in which providers spell a state. Before the line with ipmitool's answer, what it complains about may stand: that there is
// no list of vendors' numbers, for one.
func normal(s string) string {
	s = strings.TrimSpace(s)
	switch strings.ToLower(s[strings.LastIndexByte(s, '\n')+1:]) {
	case "on", "chassis power is on":
		return On
	case "off", "chassis power is off":
		return Off
	case "paused":
		return Paused
	}
	return Unknown
}

// way is one way to the BMC.
type way struct {
	name    string // for errors, with the address
	driver  string // of bmclib
	program string // that it needs; empty if none
	client  func(ctx context.Context, conns *connections) *bmclib.Client
}

func (c *Client) hasIPMI() bool { return c.o.IPMI != "" }

func (c *Client) redfish() way {
	return way{name: c.o.URL, driver: "gofish", client: func(ctx context.Context, conns *connections) *bmclib.Client {
		return bmclib.NewClient(c.host, c.o.Username, c.o.Password,
			bmclib.WithHTTPClient(c.httpClient(ctx, conns)),
			bmclib.WithRedfishPort(c.port),
			bmclib.WithPerProviderTimeout(c.o.Timeout),
			bmclib.WithLogger(logr.FromSlogHandler(c.o.Logger.Handler())),
		)
	}}
}

func (c *Client) ipmi() way {
	return way{name: "ipmi://" + c.o.IPMI, driver: "ipmitool", program: "ipmitool", client: func(context.Context, *connections) *bmclib.Client {
		return bmclib.NewClient(c.ipmiHost, c.o.Username, c.o.Password,
			bmclib.WithIpmitoolPort(c.ipmiPort),
			bmclib.WithPerProviderTimeout(c.o.Timeout),
			bmclib.WithLogger(logr.FromSlogHandler(c.o.Logger.Handler())),
		)
	}}
}

// again is how long a way that could not be opened is tried last.
const again = time.Minute

// ways returns the ways in the order in which they are to be tried.
func (c *Client) ways() []way {
	var good, bad []way
	c.mu.Lock()
	defer c.mu.Unlock()
	add := func(w way) {
		if at, ok := c.failed[w.name]; ok && time.Since(at) < again {
			bad = append(bad, w)
		} else {
			good = append(good, w)
		}
	}
	if c.o.URL != "" {
		add(c.redfish())
	}
	if c.hasIPMI() {
		add(c.ipmi())
	}
	return append(good, bad...)
}

// acceptedError is an order that the BMC took and that did not come to its end.
type acceptedError struct{ error }

func (e *acceptedError) Unwrap() error { return e.error }

// do runs one order by the first way on which it works.
func (c *Client) do(ctx context.Context, what string, order func(context.Context, *bmclib.Client) error) error {
	var errs []error
	for _, w := range c.ways() {
		err := c.on(ctx, w, what, order)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		var accepted *acceptedError
		if ctx.Err() != nil || errors.As(err, &accepted) {
			break
		}
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return &orderError{errors.Join(errs...)}
}

// on runs one order on one way, in a session of its own.
func (c *Client) on(ctx context.Context, w way, what string, order func(context.Context, *bmclib.Client) error) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithTimeoutCause(ctx, c.o.Timeout, fmt.Errorf("the host's BMC took longer than %v", c.o.Timeout))
	defer cancel()
	defer func() {
		if err != nil {
			err = &orderError{fmt.Errorf("host BMC %s: %s: %w", w.name, what, withCause(ctx, err))}
		}
	}()
	if w.program != "" {
		if _, err := exec.LookPath(w.program); err != nil {
			return fmt.Errorf("this machine lacks a program: %w", err)
		}
	}

	// bmclib dumps every request, passwords too, to standard output when this variable is "true".
	if os.Getenv("DEBUG_BMCLIB") != "" {
		if err := os.Unsetenv("DEBUG_BMCLIB"); err != nil {
			return err
		}
	}
	var conns connections
	defer context.AfterFunc(ctx, conns.close)()
	b := w.client(ctx, &conns)
	b.Registry.Drivers = b.Registry.For(w.driver)
	if err := c.open(ctx, b, &conns); err != nil {
		c.failed[w.name] = time.Now()
		return fmt.Errorf("open session: %w", err)
	}
	delete(c.failed, w.name)
	defer func() {
		if cerr := b.Close(ctx); cerr != nil {
			c.o.Logger.Debug("session with the host's BMC did not end", "err", cerr)
		}
	}()
	return order(ctx, b)
}

// open opens the session in the time for it.
func (c *Client) open(ctx context.Context, b *bmclib.Client, conns *connections) error {
	if c.o.OpenTimeout >= c.o.Timeout {
		return b.Open(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.o.OpenTimeout, fmt.Errorf("nothing after %v", c.o.OpenTimeout))
	defer cancel()
	stop := context.AfterFunc(ctx, conns.close)
	err := b.Open(ctx)
	if err != nil {
		err = withCause(ctx, err)
	}
	stop()
	return err
}

// withCause puts before err why ctx ended, if it did.
func withCause(ctx context.Context, err error) error {
	// bmclib gives its HTTP client the deadline of ctx, and that may strike a moment earlier.
	if d, ok := ctx.Deadline(); ok && time.Until(d) < 100*time.Millisecond {
		<-ctx.Done()
	}
	if cause := context.Cause(ctx); cause != nil {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// orderError is an error on one line: bmclib's take several.
type orderError struct{ error }

func (e *orderError) Error() string { return strings.Join(strings.Fields(e.error.Error()), " ") }
func (e *orderError) Unwrap() error { return e.error }

// httpClient makes a client whose connections live no longer than ctx, and that follows no redirection to another host.
func (c *Client) httpClient(ctx context.Context, conns *connections) *http.Client {
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	return &http.Client{
		Timeout: c.o.Timeout,
		Transport: &http.Transport{
			TLSClientConfig:     c.tls.Clone(),
			TLSHandshakeTimeout: 10 * time.Second,
			DisableKeepAlives:   true,
			DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
				conn, err := dialer.DialContext(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				conns.add(ctx, conn)
				return conn, nil
			},
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if req.URL.Host != via[0].URL.Host || req.URL.Scheme != "https" || len(via) > 3 {
				return fmt.Errorf("the BMC redirects to %s, which is not followed", req.URL.Host)
			}
			return nil
		},
	}
}

// connections are closed together when their context ends.
type connections struct {
	mu  sync.Mutex
	all []net.Conn // guarded by mu
}

func (c *connections) add(ctx context.Context, conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() != nil {
		conn.Close()
		return
	}
	c.all = append(c.all, conn)
}

func (c *connections) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.all {
		conn.Close() // a second close of one that ended by itself does no harm
	}
	c.all = nil
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
