package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/boot"
	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/cmd/internal/version"
	"github.com/backdoor-rhs/backdoor/redfish/host"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// journalSize is the space that the journal has; some tens of thousands of records.
const journalSize = 16 << 20

// threads has Go run on three threads where there is one CPU. By itself it would run on one, where a request waits until whoever looks through the
// host's memory has had its 10 ms (runtime.forcePreemptNS), again after each wait for the disk; of two threads Linux runs the one that has slept. The
// third is for the watch, which has one of its own with precedence. GOMAXPROCS wins.
func threads() {
	if os.Getenv("GOMAXPROCS") == "" && runtime.GOMAXPROCS(0) == 1 {
		runtime.GOMAXPROCS(3)
	}
}

// work is the second process: everything that the agent does for its host.
func work(ctx context.Context, f flags, level *slog.LevelVar, log *slog.Logger, console io.Writer) int {
	threads()
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		go limitMemory(ctx, uint64(si.Totalram)*uint64(si.Unit), log)
	}
	cfg, why := configure(f.config)
	if why != nil {
		log.Warn("starting without a valid configuration: read-only, watching nothing", "err", why)
	}
	if l, err := cfg.Level(); err == nil {
		level.Set(l)
	}
	log.Info("backdoord", "version", version.String(), "memory", cfg.Memory.Backend, "writes", cfg.Writes)

	w := newWorker(cfg, log)
	w.path, w.machine, w.console = f.config, f.machine, console
	if w.machine { // another's TPM is left alone
		w.trust = newTrust(cfg.StateDir, w.sealImages, log)
		go w.trust.start(ctx, keeperDevices())
	}
	p := newParts(cfg, log)
	for _, err := range p.problems {
		log.Error("configuration", "err", err)
	}
	w.openRDMA(p)
	w.gateway = newGateway(cfg, log)
	w.step("slots", w.openImages)
	w.step("journal and engine", func() { w.openEngine(p, why) })
	return w.run(ctx)
}

func newWorker(cfg config.Config, log *slog.Logger) *worker {
	return &worker{cfg: cfg, log: log, console: io.Discard, resets: make(chan struct{}, 1), imagesOpen: make(chan struct{})}
}

// step logs how long a part of the start took.
func (w *worker) step(name string, f func()) {
	began := time.Now()
	f()
	logStep(w.log, name, began)
}

// logStep logs that a part of the start has ended: how long it took, and how long after the start of the machine's kernel that was.
func logStep(log *slog.Logger, name string, began time.Time) {
	log.Info("start", "step", name, "took", time.Since(began).Round(time.Millisecond), "at", boot.Uptime().Round(time.Millisecond))
}

// configure loads the configuration. With an error comes one that watches and writes nothing.
func configure(path string) (config.Config, error) {
	cfg, err := config.Load(path)
	switch {
	case err == nil:
		return cfg, nil
	case config.Missing(err):
		err = fmt.Errorf("there is no configuration: %w", err)
	default:
		err = fmt.Errorf("the configuration is wrong: %w", err)
	}
	return config.Default(), err
}

type worker struct {
	cfg        config.Config
	path       string // of the configuration
	machine    bool   // it is the agent's to configure
	log        *slog.Logger
	console    io.Writer
	engine     *engine.Engine
	journal    *journal.Journal
	resets     chan struct{} // a reset of the agent's machine was asked for
	images     *images       // nil if the machine was not started from a slot
	imagesOpen chan struct{} // closed when that is known
	proved     bool          // the journal has written; of prove alone
	trust      *trust        // nil: the machine is not the agent's own
	service    atomic.Pointer[service.Service]

	remote  *remote  // nil if RDMA is not served
	gateway *gateway // nil if the agent does not stand between the host and the wire
}

// reset is how Redfish restarts the agent's machine: this process ends, and its keeper does it.
func (w *worker) reset(_ context.Context, graceful bool) error {
	w.log.Warn("a restart was asked for over Redfish", "graceful", graceful)
	select {
	case w.resets <- struct{}{}:
	default: // one is under way
	}
	return nil
}

// openEngine makes the engine, which watches whatever else is amiss.
func (w *worker) openEngine(p *parts, why error) {
	if err := os.MkdirAll(w.cfg.StateDir, 0o700); err != nil {
		w.log.Error("make state directory", "err", err)
	}
	j, err := journal.OpenFile(filepath.Join(w.cfg.StateDir, "journal"), journalSize)
	if err != nil {
		// Without a journal the engine writes nothing, and says so; it still watches.
		w.log.Error("open journal: nothing will be written to the host", "err", err)
	} else {
		w.journal = j
	}
	cache := filepath.Join(w.cfg.StateDir, "cache")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		w.log.Warn("make cache directory", "err", err)
		cache = ""
	}
	o := engine.Options{
		Logger:    w.log,
		Memory:    memory(w.cfg, w.log, why),
		Writes:    w.cfg.Writes,
		HostUUID:  w.cfg.HostUUID,
		Agreement: lockAgreement(w.cfg, p.agreement, w.trust, w.log),
		Mailbox:   w.cfg.Agreement.Mailbox,
		Policy:    p.policy,
		Journal:   w.journal,
		Power:     p.power,
		Interval:  w.cfg.Intervals.Pass.Std(),
		OwnThread: true,
		CacheDir:  cache,
		RecordDir: filepath.Join(w.cfg.StateDir, "recordings"),
		Types:     kernel.TypesDir(filepath.Join(w.cfg.StateDir, "types")),
		Known:     kernel.KnownDir(filepath.Join(w.cfg.StateDir, "golden")),
	}
	if w.gateway != nil {
		o.Network = w.gateway
	}
	w.engine = engine.New(o)
}

// newService makes the Redfish service. What is wrong with its part of the state directory keeps it from being made, and must
// not keep the engine from its work.
func (w *worker) newService() (*service.Service, error) {
	so := service.Options{
		Logger:   w.log,
		StateDir: filepath.Join(w.cfg.StateDir, "redfish"),
		Names:    w.cfg.Redfish.Names,
		Announce: w.announce,
	}
	host.Configure(&so)
	so.Conditions = host.Conditions(w.engine.Findings)
	if w.trust != nil {
		so.Vault = w.trust.keys()
	}
	if w.journal != nil {
		so.Audit = host.Audit(w.journal)
	}
	w.configureUpdates(&so)
	svc, err := service.New(so)
	if err != nil {
		return nil, fmt.Errorf("make Redfish service: %w", err)
	}
	ho := host.Options{Agent: w.engine, Version: version.Get().Version, ResetAgent: w.reset, DumpDir: filepath.Join(w.cfg.StateDir, "dumps")}
	w.offerRDMA(&ho, svc)
	if w.gateway != nil {
		ho.Datapath = w.gateway
	}
	if c, ok := w.engine.Power().(host.Controller); ok {
		ho.Controller = c
	}
	if w.journal != nil {
		ho.Journal = w.journal
	}
	if w.machine {
		ho.Network = newNetwork(w.path, w.log)
	}
	if t := w.trust; t != nil {
		t.claims.Store(&claims{
			shown: func() attest.Digest { return sha256.Sum256(svc.Certificate().RawSubjectPublicKeyInfo) },
			agreed: func() attest.Digest {
				var d attest.Digest
				if s := w.engine.State(); s.Agreement == nil || d.UnmarshalText([]byte(s.Agreement.Digest)) != nil {
					return attest.Digest{}
				}
				return d
			},
		})
		t.claim()
		ho.Attestor = t
	}
	svc.Handle(host.Routes(svc, ho)...)
	sum := sha256.Sum256(svc.Certificate().Raw)
	fmt.Fprintf(w.console, "backdoord: Redfish on %s, certificate SHA-256 %s\n", w.cfg.Redfish.Listen, hex.EncodeToString(sum[:]))
	return svc, nil
}

// announce shows the initial password on the console, and nowhere else.
func (w *worker) announce(c service.Credential) {
	fmt.Fprintf(w.console, "\nbackdoord: log in as %q with the initial password %q; it must be changed then.\n\n", c.User, c.Password)
}

// run runs the parts until ctx ends.
func (w *worker) run(ctx context.Context) int {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { supervise(ctx, w.log, "engine", w.engine.Run) })
	w.serveRDMA(ctx, &wg)
	if w.gateway != nil {
		wg.Go(func() { supervise(ctx, w.log, "datapath", w.gateway.run) })
	}
	wg.Go(func() {
		var svc *service.Service
		supervise(ctx, w.log, "redfish", func(ctx context.Context) (err error) {
			if svc == nil {
				w.step("Redfish", func() { svc, err = w.newService() })
				if err != nil {
					return err
				}
				w.service.Store(svc)
				go host.Relay(ctx, svc, w.engine.Subscribe(ctx)) // once, however often the service starts
			}
			return svc.ListenAndServe(ctx, w.cfg.Redfish.Listen)
		})
	})
	wg.Go(func() { w.prove(ctx) })
	if w.trust != nil {
		wg.Go(func() { w.keepSeal(ctx) })
	}
	wg.Go(func() { beat(ctx, w.answers, w.log) })
	code := 0
	select {
	case <-ctx.Done():
	case <-w.resets:
		code = exitReboot
		if w.trust != nil {
			w.trust.refresh()
		}
		cancel()
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(15 * time.Second):
		w.log.Error("a part does not end; leaving it")
	}
	if w.journal != nil {
		if err := w.journal.Close(); err != nil {
			w.log.Error("close journal", "err", err)
		}
	}
	return code
}

// answers asks the parts for a sign of life.
func (w *worker) answers(context.Context) error {
	w.engine.Brief() // blocks if the engine has locked itself up, and then nobody beats
	return nil
}

// supervise runs a part, and again when it fails or panics, ever more slowly if it does so at once.
func supervise(ctx context.Context, log *slog.Logger, name string, part func(context.Context) error) {
	delay := time.Second
	for {
		started := time.Now()
		err := guarded(ctx, part)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("ended by itself")
		}
		if time.Since(started) > time.Minute {
			delay = time.Second
		}
		log.Error("a part has ended; starting it again", "part", name, "err", err, "in", delay)
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
		delay = min(2*delay, 30*time.Second)
	}
}

// guarded turns a panic into an error with the place where it happened.
func guarded(ctx context.Context, part func(context.Context) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, strings.TrimSpace(string(debug.Stack())))
		}
	}()
	return part(ctx)
}
