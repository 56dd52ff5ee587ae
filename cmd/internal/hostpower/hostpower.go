// Package hostpower switches the host's power through its service processor (BMC) by Redfish, with bmclib.
//
// It is bmclib behind a typed, honest door. Of bmclib's providers only gofish, the generic Redfish client, is used: the
// others probe the BMC with vendors' logins. What else it takes care of, all seen with bmclib 2.3.5:
//
//   - bmclib does not verify certificates unless told to. Here the BMC must prove itself by a CA or a pinned certificate.
//   - bmclib's "soft" reports a failure when the BMC has accepted the order. The outcome is taken from the provider's error.
//   - bmclib's "reset" asks for PowerCycle and, refused, waits nine seconds for a graceful shutdown and reports success
//     although a crashed host is still up. It is not used.
//   - gofish ignores the context. Here the connections die with it.
//   - Power states are free text. Here they are on, off or unknown, and unknown is never taken for either.
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
	Unknown = "unknown" // powering up, powering down, paused, or what else a BMC may say
)

// ErrState means that the host's power state does not permit the order, or did not come about in time.
var ErrState = errors.New("unexpected power state")

// Options say which BMC it is and how it proves that it is that one.
type Options struct {
	URL      string // https://host[:port]
	Username string
	Password string
	// Roots verify the BMC's certificate; nil means the system's roots.
	Roots *x509.CertPool
	// Pin, if not empty, is the SHA-256 of the BMC's certificate in hexadecimal; then its names and its issuer do not matter.
	Pin string
	// Timeout bounds one order, with the waiting for its effect; zero means 30 s.
	Timeout time.Duration
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
	tls        *tls.Config
	poll       time.Duration

	mu sync.Mutex // held during an order
}

var _ heal.Power = (*Client)(nil)

// New checks the options. It does not talk to the BMC.
func New(o Options) (*Client, error) {
	u, err := url.Parse(o.URL)
	if err != nil {
		return nil, fmt.Errorf("host BMC: %w", err)
	}
	if u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("host BMC: want https://host or https://host:port, found %q", o.URL)
	}
	c := &Client{o: o, host: u.Hostname(), port: u.Port(), poll: 250 * time.Millisecond}
	if strings.Contains(c.host, ":") {
		c.host = "[" + c.host + "]"
	}
	if c.port == "" {
		c.port = "443"
	}
	if c.o.Timeout == 0 {
		c.o.Timeout = 30 * time.Second
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

// State returns On, Off or Unknown.
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
			return fmt.Errorf("the host is off and has not been switched on again: %w", err)
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
			return fmt.Errorf("order %q was accepted: wait for power %q: %w: the BMC last said %q", order, want, ErrState, last)
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

// normal maps the ways in which providers spell a state.
func normal(s string) string {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "on", "chassis power is on":
		return On
	case "off", "chassis power is off":
		return Off
	}
	return Unknown
}

// do runs one order in a session of its own.
func (c *Client) do(ctx context.Context, what string, order func(context.Context, *bmclib.Client) error) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithTimeoutCause(ctx, c.o.Timeout, fmt.Errorf("the host's BMC took longer than %v", c.o.Timeout))
	defer cancel()
	defer func() {
		if err != nil {
			// bmclib gives its HTTP client the same deadline, and that may strike a moment earlier.
			if d, ok := ctx.Deadline(); ok && time.Until(d) < 100*time.Millisecond {
				<-ctx.Done()
			}
			if cause := context.Cause(ctx); cause != nil {
				err = fmt.Errorf("%w: %w", cause, err)
			}
			err = &orderError{fmt.Errorf("host BMC %s: %s: %w", c.o.URL, what, err)}
		}
	}()

	// bmclib dumps every request, passwords too, to standard output when this variable is "true".
	if os.Getenv("DEBUG_BMCLIB") != "" {
		if err := os.Unsetenv("DEBUG_BMCLIB"); err != nil {
			return err
		}
	}
	var conns connections
	defer context.AfterFunc(ctx, conns.close)()
	b := bmclib.NewClient(c.host, c.o.Username, c.o.Password,
		bmclib.WithHTTPClient(c.httpClient(ctx, &conns)),
		bmclib.WithRedfishPort(c.port),
		bmclib.WithPerProviderTimeout(c.o.Timeout),
		bmclib.WithLogger(logr.FromSlogHandler(c.o.Logger.Handler())),
	)
	b.Registry.Drivers = b.Registry.For("gofish")
	if err := b.Open(ctx); err != nil {
		return fmt.Errorf("open session: %w", err)
	}
	defer func() {
		if cerr := b.Close(ctx); cerr != nil {
			c.o.Logger.Debug("session with the host's BMC did not end", "err", cerr)
		}
	}()
	return order(ctx, b)
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
