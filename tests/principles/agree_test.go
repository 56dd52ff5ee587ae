package principles

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
)

// onHostFile writes a document to a file on the host.
func (b *bench) onHostFile(ctx context.Context, path string, doc *access.Agreement) error {
	raw, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	r, err := b.host.Exec(ctx, "cat >"+path+" <<'EOF'\n"+string(raw)+"\nEOF\n")
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("write %s on the host: %s", path, r.Stderr)
	}
	return err
}

// mailbox has the host hold a document for the agent, until stop.
func (b *bench) mailbox(ctx context.Context, doc *access.Agreement) (stop func() error, err error) {
	if err := b.onHostFile(ctx, "/tmp/signed.json", doc); err != nil {
		return nil, err
	}
	r, err := b.host.Exec(ctx, "backdoor-agree -mailbox /tmp/signed.json >/tmp/agree.log 2>&1 & p=$!; for i in $(seq 600); do grep -q mailbox /tmp/agree.log && break; kill -0 $p || break; usleep 100000; done; cat /tmp/agree.log; kill -0 $p && echo $p >/tmp/agree.pid")
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("backdoor-agree -mailbox: %s%s", r.Stdout, r.Stderr)
	}
	return func() error {
		_, err := b.host.Exec(context.WithoutCancel(ctx), "kill $(cat /tmp/agree.pid)")
		return err
	}, err
}

// enrol has all make the agreement: the host signs a draft, then owner and monitor do, and the host hands it to the agent, which has
// none yet, in its memory. It returns how long the agent took to lock it.
func (b *bench) enrol(ctx context.Context) (time.Duration, error) {
	raw, err := os.ReadFile(filepath.Join(b.lab.Dir(), "agreement.json"))
	if err != nil {
		return 0, err
	}
	draft, err := access.Parse(bytes.NewReader(raw))
	if err != nil {
		return 0, err
	}
	draft.Signatures = nil
	if err := b.onHostFile(ctx, "/tmp/draft.json", draft); err != nil {
		return 0, err
	}
	r, err := b.host.Exec(ctx, "backdoor-agree -y /tmp/draft.json >&2 && cat /tmp/draft.json")
	if err != nil || r.Code != 0 {
		return 0, fmt.Errorf("backdoor-agree: %w: %s", err, r.Stderr)
	}
	signed, err := access.Parse(bytes.NewReader([]byte(r.Stdout)))
	if err != nil {
		return 0, err
	}
	var owner ed25519.PrivateKey
	for _, who := range []string{"owner", "monitor"} {
		k, err := b.lab.Key(who)
		if err == nil {
			err = signed.Sign(k)
		}
		if err != nil {
			return 0, err
		}
		if who == "owner" {
			owner = k
		}
	}
	if err := signed.Verify(owner.Public().(ed25519.PublicKey)); err != nil {
		return 0, err
	}
	digest, err := signed.Digest()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	stop, err := b.mailbox(ctx, signed)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("not within a minute"))
	defer cancel()
	_, err = b.agent.WaitState(ctx, "the agreement in the host's mailbox", func(s engine.State) bool {
		return s.Agreement != nil && s.Agreement.Digest == digest
	})
	b.held = signed
	return time.Since(began), errors.Join(err, stop())
}

// hostHasNoSay has the host, which took part in the agreement once, try to change it afterwards: it hands the agent documents that widen,
// narrow and close it, signed by all even, and nothing comes of it. What is planted is that the operator sends the agent such a document.
func hostHasNoSay(ctx context.Context, b *bench) (string, error) {
	digest, err := b.held.Digest()
	if err != nil {
		return "", err
	}
	owner, err := b.lab.Key("owner")
	if err != nil {
		return "", err
	}
	monitor, err := b.lab.Key("monitor")
	if err != nil {
		return "", err
	}
	tries := 0
	for name, change := range map[string]func(*access.Agreement){
		"widened":  func(a *access.Agreement) { a.ValidUntil = a.ValidUntil.AddDate(1, 0, 0) },
		"narrowed": func(a *access.Agreement) { a.Rights.Write, a.Rights.Actions = false, []string{} },
		"closed":   func(a *access.Agreement) { a.ValidUntil = a.ValidFrom.Add(time.Second) },
	} {
		for who, keys := range map[string][]ed25519.PrivateKey{"by the host with its own key": nil, "by the host with a document of all": {owner, monitor}} {
			next := *b.held
			next.ID, next.Succeeds, next.Signatures, next.Endorsements = name, digest, nil, nil
			change(&next)
			public, own, err := ed25519.GenerateKey(nil)
			if err != nil {
				return "", err
			}
			next.Host.Key = access.Key(public)
			if keys == nil { // it calls itself the owner and the monitor, too
				next.Owner.Key, next.Monitors = access.Key(own.Public().(ed25519.PublicKey)), b.held.Monitors
				next.Host.Key = nil
				keys = []ed25519.PrivateKey{own, monitor}
			} else {
				keys = append([]ed25519.PrivateKey{own}, keys...)
			}
			for _, k := range keys {
				if err := next.Sign(k); err != nil {
					return "", err
				}
			}
			before, err := b.agent.State(ctx)
			if err != nil {
				return "", err
			}
			stop, err := b.mailbox(ctx, &next)
			if err != nil {
				return "", err
			}
			if b.calm && len(keys) == 3 {
				raw, err := json.Marshal(next)
				if err == nil {
					err = b.agent.OfferAgreement(ctx, raw)
				}
				if err != nil {
					return "", errors.Join(fmt.Errorf("plant it: %w", err), stop())
				}
				b.held = &next
			}
			// The agent had looked each second while it had none.
			late, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("not within 30 s"))
			after, err := b.agent.WaitState(late, "further passes", func(s engine.State) bool { return s.Passes > before.Passes+10 })
			cancel()
			if err := errors.Join(err, stop()); err != nil {
				return "", err
			}
			if after.Agreement == nil || after.Agreement.Digest != digest {
				return "", fmt.Errorf("the agreement was %s %s", name, who)
			}
			tries++
		}
	}
	return fmt.Sprintf("locked %v after the host was told to put it into its mailbox; %d documents there afterwards, some signed by all: no effect", b.enrolled.Round(100*time.Millisecond), tries), nil
}
