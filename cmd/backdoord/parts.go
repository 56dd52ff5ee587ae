package main

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/cmd/internal/hostpower"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// parts are what the configuration names, as far as it could be made. What could not is a problem, and its place is taken
// by what is safe: no agreement permits nothing, the default policy waits, no power controller switches nothing.
type parts struct {
	cfg       config.Config
	agreement *access.Agreement // to be offered to the lock
	policy    policy.Policy
	power     heal.Power
	keys      []export.Key // of RDMA
	problems  []error
}

func newParts(cfg config.Config, log *slog.Logger) *parts {
	p := &parts{cfg: cfg, policy: policy.Default()}
	problem := func(err error) { p.problems = append(p.problems, err) }
	if cfg.Agreement.File != "" {
		a, err := loadAgreement(cfg.Agreement)
		if err != nil {
			problem(fmt.Errorf("access agreement: %w; without one nothing is written to the host", err))
		} else {
			p.agreement = a
		}
	}
	if cfg.PolicyFile != "" {
		pol, err := loadPolicy(cfg.PolicyFile)
		if err != nil {
			problem(fmt.Errorf("policy: %w; every finding waits for an operator", err))
		} else {
			p.policy = pol
		}
	}
	if cfg.HostBMC != nil {
		power, err := newPower(*cfg.HostBMC, log)
		if err != nil {
			problem(fmt.Errorf("%w; the host's power cannot be switched", err))
		} else {
			p.power = power
		}
	}
	if len(cfg.RDMA.Keys) > 0 {
		keys, err := loadKeys(cfg.RDMA)
		if err != nil {
			problem(fmt.Errorf("%w; without Redfish nobody can connect by RDMA", err))
		} else {
			p.keys = keys
		}
	}
	return p
}

// lockAgreement opens the lock of the access agreement in the state directory, which decides once it holds one, and offers it the
// configured document. Where the machine's TPM is to vouch for the lock, both wait for that. It returns nil, which permits nothing, if
// there is no owner to trust.
func lockAgreement(cfg config.Config, offered *access.Agreement, t *trust, log *slog.Logger) *access.Lock {
	if len(cfg.Agreement.OwnerKey) == 0 {
		return nil
	}
	lock, err := access.OpenLock(filepath.Join(cfg.StateDir, "agreement.lock"), ed25519.PublicKey(cfg.Agreement.OwnerKey), nil)
	if err != nil {
		log.Error("nothing is permitted", "err", err)
		return nil
	}
	if t == nil || !t.measured() {
		offerAgreement(lock, offered, log)
		return lock
	}
	lock.Await()
	go func() {
		if err := lock.Anchor(t.anchor(cfg.Agreement.OwnerKey)); err != nil {
			log.Error("nothing is permitted", "err", err)
		}
		offerAgreement(lock, offered, log)
		t.claim()
	}()
	return lock
}

// offerAgreement offers the configured document to the lock, if there is one.
func offerAgreement(lock *access.Lock, offered *access.Agreement, log *slog.Logger) {
	if offered == nil {
		return
	}
	if err := lock.Offer(offered); err != nil {
		if held := lock.Agreement(); held != nil {
			log.Warn("the configured access agreement is not taken: the locked one holds", "locked", held.ID, "err", err)
		} else {
			log.Error("the access agreement is not taken: nothing is permitted", "err", err)
		}
	}
}

func loadAgreement(c config.Agreement) (*access.Agreement, error) {
	f, err := os.Open(c.File)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return access.Load(f, ed25519.PublicKey(c.OwnerKey))
}

func loadPolicy(path string) (policy.Policy, error) {
	f, err := os.Open(path)
	if err != nil {
		return policy.Policy{}, err
	}
	defer f.Close()
	p, err := policy.Load(f)
	if err == nil {
		err = engine.CheckPolicy(p)
	}
	if err != nil {
		return policy.Policy{}, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return p, nil
}

func newPower(b config.HostBMC, log *slog.Logger) (heal.Power, error) {
	password, err := b.BMCPassword()
	if err != nil {
		return nil, err
	}
	o := hostpower.Options{
		URL: b.URL, IPMI: b.IPMI, Username: b.Username, Password: password, Pin: b.CertificateSHA256, OffOn: b.OffOn,
		Timeout: b.Timeout.Std(), Logger: log,
	}
	if b.CAFile != "" {
		pem, err := os.ReadFile(b.CAFile)
		if err != nil {
			return nil, fmt.Errorf("host BMC: read certificate authority: %w", err)
		}
		o.Roots = x509.NewCertPool()
		if !o.Roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("host BMC: %s holds no PEM certificate", b.CAFile)
		}
	}
	return hostpower.New(o)
}

// errNothingToWatch is why the engine has no memory when none is configured.
var errNothingToWatch = errors.New("no path to a host's memory is configured (memory.backend is none)")

// memory returns the function with which the engine opens the path to the host's memory, as often as it needs to.
func memory(cfg config.Config, log *slog.Logger, why error) func(context.Context) (hostmem.Memory, error) {
	return func(context.Context) (hostmem.Memory, error) {
		if why != nil {
			return nil, why
		}
		m := cfg.Memory
		var mem hostmem.Memory
		var err error
		switch m.Backend {
		case config.BackendPCI:
			o := hostmem.PCIOptions{Layout: m.Extents(), Write: cfg.Writes, Logger: log}
			if o.ID, o.Address, err = m.PCIDevice(); err != nil {
				return nil, err
			}
			if m.BAR != nil {
				o.BAR = *m.BAR
			}
			mem, err = opened(hostmem.OpenPCI(o))
		case config.BackendRAMFile:
			mem, err = opened(hostmem.OpenRAMFile(m.Path, m.Extents(), cfg.Writes))
		case config.BackendImage:
			mem, err = hostmem.OpenImage(m.Path)
		default:
			return nil, errNothingToWatch
		}
		if err != nil {
			return nil, err
		}
		if m.Engine.Enabled {
			mem = hostmem.NewEngine(mem, hostmem.EngineOptions{})
		}
		if m.BytesPerSecond != 0 {
			mem = hostmem.Budget(mem, uint64(m.BytesPerSecond))
		}
		return mem, nil
	}
}

// opened keeps a nil pointer from becoming a Memory that is not nil.
func opened[M hostmem.Memory](m M, err error) (hostmem.Memory, error) {
	if err != nil {
		return nil, err
	}
	return m, nil
}
