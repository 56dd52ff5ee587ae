package principles

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// answers asks the agent for the host again and again, and returns the slowest answer and the last one.
func (b *bench) answers(ctx context.Context, n int) (worst time.Duration, last schema.ComputerSystem, err error) {
	for range n {
		began := time.Now()
		actx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, errors.New("no answer within 10 s"))
		err := b.agent.Get(actx, "/redfish/v1/Systems/system", &last)
		cancel()
		if err != nil {
			return worst, last, fmt.Errorf("no answer about the host: %w", err)
		}
		worst = max(worst, time.Since(began))
	}
	return worst, last, nil
}

// available asks the agent about a host in every plight.
func available(ctx context.Context, b *bench) (string, error) {
	const each = 20
	idle, _, err := b.answers(ctx, 2*each)
	if err != nil {
		return "", err
	}
	said := []string{fmt.Sprintf("idle %v", idle.Round(time.Millisecond))}
	finding := func(kind detect.Kind) func(context.Context) error {
		since := time.Now()
		return func(ctx context.Context) error {
			_, err := b.agent.WaitFinding(ctx, func(f detect.Finding) bool { return f.Kind == kind && f.LastSeen.After(since) })
			return err
		}
	}
	back := func(ctx context.Context, boots, attaches int) error {
		if _, err := b.host.WaitBoot(ctx, boots); err != nil {
			return err
		}
		_, err := b.agent.WaitAttached(ctx, attaches+1)
		return err
	}
	for _, plight := range []struct {
		name  string
		enter func() (func(context.Context) error, error) // returns what the agent must come to say
		leave func(boots, attaches int) error
	}{
		{"flooding", func() (func(context.Context) error, error) {
			ended := make(chan error, 1)
			go func() {
				_, err := b.host.Frames(ctx, control.FramesArgs{Frames: [][]byte{eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(9, 9, "flood")))}, For: 4 * time.Second})
				ended <- err
			}()
			return func(context.Context) error { return <-ended }, nil
		}, func(int, int) error { return nil }},
		{"out of memory", func() (func(context.Context) error, error) {
			killed := make(chan error, 1)
			go func() {
				// A line without an end, of which tail keeps all; the kernel ends it.
				r, err := b.host.Exec(ctx, "tail /dev/zero >/dev/null; dmesg | grep -c 'Out of memory: Killed process'")
				if err == nil && r.Code != 0 {
					err = fmt.Errorf("nothing was killed for want of memory: %s%s", r.Stdout, r.Stderr)
				}
				killed <- err
			}()
			return func(ctx context.Context) error {
				select {
				case err := <-killed:
					return err
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}, nil
		}, func(int, int) error { return nil }},
		{"without its network driver", func() (func(context.Context) error, error) {
			r, err := b.host.Exec(ctx, "rmmod virtio_net && ! [ -e /sys/class/net/eth0 ]")
			if err == nil && r.Code != 0 {
				err = fmt.Errorf("the driver stays: %s%s", r.Stdout, r.Stderr)
			}
			return func(context.Context) error { return nil }, err
		}, func(boots, attaches int) error {
			return errors.Join(b.host.PowerCycle(ctx), back(ctx, boots, attaches))
		}},
		{"paused", func() (func(context.Context) error, error) {
			return finding(detect.KindHostSilent), b.host.Freeze(ctx)
		}, func(int, int) error { return b.host.Thaw(ctx) }},
		{"reset", func() (func(context.Context) error, error) {
			return func(context.Context) error { return nil }, b.host.Reset(ctx)
		}, func(boots, attaches int) error { return back(ctx, boots, attaches) }},
		{"starting another kernel by kexec", func() (func(context.Context) error, error) {
			return func(context.Context) error { return nil }, b.host.Kexec(ctx)
		}, func(boots, attaches int) error { return back(ctx, boots, attaches) }},
		{"interrupts off", func() (func(context.Context) error, error) {
			_, err := b.host.Fault(ctx, lab.FaultIRQsOff)
			return finding(detect.KindCPUStall), err
		}, func(boots, attaches int) error {
			return errors.Join(b.host.PowerCycle(ctx), back(ctx, boots, attaches))
		}},
		{"panicked", func() (func(context.Context) error, error) {
			_, err := b.host.Fault(ctx, lab.FaultPanic)
			return finding(detect.KindPanic), err
		}, func(boots, attaches int) error {
			return errors.Join(b.host.PowerCycle(ctx), back(ctx, boots, attaches))
		}},
		{"off", func() (func(context.Context) error, error) {
			return func(ctx context.Context) error {
				for {
					_, s, err := b.answers(ctx, 1)
					if err != nil || s.PowerState == schema.PowerOff {
						return err
					}
				}
			}, b.host.PowerOff(ctx)
		}, func(boots, attaches int) error {
			return errors.Join(b.host.PowerOn(ctx), back(ctx, boots, attaches))
		}},
	} {
		st, err := b.agent.State(ctx)
		if err != nil {
			return "", err
		}
		boots := b.host.Boots()
		truth, err := plight.enter()
		if err != nil {
			return "", fmt.Errorf("%s: %w", plight.name, err)
		}
		worst, _, err := b.answers(ctx, each)
		if err == nil {
			tctx, cancel := context.WithTimeoutCause(ctx, 40*time.Second, errors.New("it does not come to say so within 40 s"))
			err = truth(tctx)
			cancel()
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", plight.name, err)
		}
		if err := plight.leave(boots, st.Attaches); err != nil {
			return "", fmt.Errorf("after %s: %w", plight.name, err)
		}
		said = append(said, fmt.Sprintf("%s %v", plight.name, worst.Round(time.Millisecond)))
	}
	return "slowest answer: " + strings.Join(said, ", "), nil
}

// undisturbed restarts the DPU alone. What it kept back of the host's traffic it keeps back afterwards.
func undisturbed(ctx context.Context, b *bench) (string, error) {
	if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkQuarantine, Remote: "203.0.113.10", Seconds: 3600}); err != nil {
		return "", err
	}
	look := func() (string, error) {
		r, err := b.host.Exec(ctx, "cat /proc/sys/kernel/random/boot_id; ls /proc/irq; ls /sys/bus/pci/devices; ps -o pid,comm | grep -v -e ' ps' -e ' grep' -e ' sh' -e ' cat' -e ' sleep' -e ' busybox' -e kworker; dmesg | wc -l")
		return r.Stdout, err
	}
	before, err := look()
	if err != nil {
		return "", err
	}
	began := time.Now()
	if err := b.lab.DPU.Restart(ctx); err != nil {
		return "", err
	}
	took := time.Since(began)
	if b.calm { // what is planted
		if _, err := b.host.Exec(ctx, "echo 'the DPU has restarted' >/dev/kmsg"); err != nil {
			return "", err
		}
	}
	after, err := look()
	if err != nil {
		return "", err
	}
	if _, err := b.agent.WaitAttached(ctx, 1); err != nil {
		return "", err
	}
	net, err := b.network(ctx)
	if err != nil {
		return "", err
	}
	if len(net.Containment.Blocked) != 1 {
		return "", fmt.Errorf("what was kept back is not any more: %+v", net.Containment)
	}
	if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
		return "", err
	}
	if before != after {
		return "", fmt.Errorf("the host is another afterwards:\n%s", difference(before, after))
	}
	return fmt.Sprintf("no line of its log, no process, device or interrupt is another (the DPU was away for %.1f s)", took.Seconds()), nil
}

// volatile are numbers that change on every machine from moment to moment.
var volatile = regexp.MustCompile(`[0-9]+`)

// spy is what the host's root looks at to find out whether somebody watches. Numbers are left out where time alone changes them.
var spy = []struct {
	name, command string
	numbers       bool // they are part of it
}{
	{"PCI", "for d in /sys/bus/pci/devices/*; do echo $d $(cat $d/vendor $d/device $d/class $d/irq $d/enable); od -An -tx1 $d/config; done", true},
	{"ACPI", "for t in /sys/firmware/acpi/tables/*; do [ -f $t ] && echo $t $(md5sum <$t); done", true},
	{"iomem", "cat /proc/iomem /proc/ioports", true},
	{"e820", "for m in /sys/firmware/memmap/*; do cat $m/start $m/end $m/type; done", true},
	{"interrupts", "cat /proc/interrupts", false},
	{"devices", "find /sys/devices -maxdepth 4 | sort; cat /proc/devices", true},
	{"drivers and modules", "cat /proc/modules; ls /sys/bus/*/drivers", false},
	{"links", "ip link; ip addr | grep -v valid_lft; ip route", true},
	{"neighbours", "ip neigh | grep -v '^10.0.2.'", true},
	{"sockets", "cat /proc/net/packet /proc/net/raw", false},
	{"kernel log", "dmesg", true},
	{"taint", "cat /proc/sys/kernel/tainted; cat /proc/sys/kernel/kptr_restrict", true},
	{"processes", "ps -o comm | grep -v -e '^$' -e kworker -e sleep -e '^ps' -e '^grep' -e '^sh' -e '^cat' -e '^sort' | sort", true},
	{"scan", "for i in 1 2 3 4; do nc -w 1 10.0.2.$i 443 </dev/null >/dev/null 2>&1 && echo 10.0.2.$i 443; done; nc -w 2 192.168.190.2 443 </dev/null 2>&1 || echo nothing", true},
}

// transparent has the host's root look for the agent while it stands still, and while it works at full rate.
func transparent(ctx context.Context, b *bench) (string, error) {
	look := func() (map[string]string, error) {
		all := map[string]string{}
		for _, s := range spy {
			r, err := b.host.Exec(ctx, s.command)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			text := r.Stdout
			if !s.numbers {
				text = volatile.ReplaceAllString(text, "#")
				text = strings.Join(strings.Fields(text), " ")
			}
			if len(strings.TrimSpace(text)) == 0 && s.name != "neighbours" && s.name != "sockets" && s.name != "ACPI" {
				return nil, fmt.Errorf("%s: nothing was seen: %s", s.name, r.Stderr)
			}
			all[s.name] = text
		}
		return all, nil
	}
	if _, err := look(); err != nil { // what looking itself leaves behind is there from now on
		return "", err
	}
	if err := b.lab.DPU.QMP(ctx, "stop", nil, nil); err != nil {
		return "", err
	}
	alone, err := look()
	if err := errors.Join(err, b.lab.DPU.QMP(context.WithoutCancel(ctx), "cont", nil, nil)); err != nil {
		return "", err
	}
	st, err := b.agent.State(ctx)
	if err != nil {
		return "", err
	}
	if b.calm { // what is planted: something that an agent on the host would do
		if _, err := b.host.Spawn(ctx, control.SpawnArgs{Comm: "monitord", CPU: -1, Argv: []string{"sleep", "1000000"}}); err != nil {
			return "", err
		}
	}
	watched, err := look()
	if err != nil {
		return "", err
	}
	now, err := b.agent.State(ctx)
	if err != nil {
		return "", err
	}
	if now.Passes <= st.Passes+5 {
		return "", fmt.Errorf("the agent has made %d passes meanwhile; there was nothing to see", now.Passes-st.Passes)
	}
	for _, s := range spy {
		if alone[s.name] != watched[s.name] {
			return "", fmt.Errorf("%s is different while the agent works:\n%s", s.name, difference(alone[s.name], watched[s.name]))
		}
	}
	return fmt.Sprintf("%d views compared, %d passes of the agent meanwhile: no difference", len(spy), now.Passes-st.Passes), nil
}

// difference returns the lines that one text has and the other has not.
func difference(a, b string) string {
	var out []string
	la, lb := strings.Split(a, "\n"), strings.Split(b, "\n")
	for _, l := range la {
		if !slices.Contains(lb, l) {
			out = append(out, "- "+l)
		}
	}
	for _, l := range lb {
		if !slices.Contains(la, l) {
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out[:min(len(out), 20)], "\n")
}

// locked tries to change the agreement by everybody alone, and has its owner stop it.
func locked(ctx context.Context, b *bench) (string, error) {
	owner, err := b.lab.Key("owner")
	if err != nil {
		return "", err
	}
	monitor, err := b.lab.Key("monitor")
	if err != nil {
		return "", err
	}
	digest, err := b.held.Digest()
	if err != nil {
		return "", err
	}
	now := func() (*engine.AgreementState, error) {
		st, err := b.agent.State(ctx)
		return st.Agreement, err
	}
	a, err := now()
	if err != nil {
		return "", err
	}
	if a == nil || a.Digest != digest {
		return "", fmt.Errorf("the agent holds %+v, not the agreement of digest %s", a, digest)
	}
	offer := func(change func(*access.Agreement), keys ...ed25519.PrivateKey) (*access.Agreement, error) {
		next := *b.held
		next.Signatures, next.Endorsements = nil, nil
		next.Host.Key = nil // the host took part once; nobody asks it again
		change(&next)
		for _, k := range keys {
			if err := next.Sign(k); err != nil {
				return nil, err
			}
		}
		doc, err := json.Marshal(next)
		if err != nil {
			return nil, err
		}
		return &next, b.agent.OfferAgreement(ctx, doc)
	}
	widen := func(a *access.Agreement) {
		a.ID, a.Succeeds, a.ValidUntil = "wider", digest, a.ValidUntil.AddDate(1, 0, 0)
	}
	narrow := func(a *access.Agreement) { a.ID, a.Succeeds, a.Rights.Write = "narrower", digest, false }
	end := func(a *access.Agreement) {
		a.ID, a.Succeeds, a.ValidUntil = "shorter", digest, time.Now().Add(time.Second).UTC().Truncate(time.Second)
	}
	again := func(a *access.Agreement) { a.ID, a.Rights.Power = "unrelated", true }
	tries := 0
	for _, try := range []struct {
		name   string
		change func(*access.Agreement)
		keys   []ed25519.PrivateKey
	}{
		{"widened by an administrator", widen, nil}, {"widened by its owner alone", widen, []ed25519.PrivateKey{owner}}, {"widened by a monitor", widen, []ed25519.PrivateKey{monitor}},
		{"narrowed by a monitor", narrow, []ed25519.PrivateKey{monitor}}, {"narrowed by its owner alone", narrow, []ed25519.PrivateKey{owner}},
		{"closed by a monitor", end, []ed25519.PrivateKey{monitor}}, {"replaced without succeeding it, by all", again, []ed25519.PrivateKey{owner, monitor}},
	} {
		keys := try.keys
		if b.calm && try.name == "widened by its owner alone" {
			keys = []ed25519.PrivateKey{owner, monitor} // what is planted: nobody alone, but all together
		}
		next, err := offer(try.change, keys...)
		var refused *client.Error
		switch {
		case err == nil:
			b.held = next
			return "", fmt.Errorf("the agreement was %s", try.name)
		case !errors.As(err, &refused) || refused.Status < 400 || refused.Status >= 500:
			return "", fmt.Errorf("%s: %w", try.name, err)
		}
		tries++
	}
	order := func(what string, seq uint64, key ed25519.PrivateKey) (*access.Order, error) {
		o := &access.Order{Version: access.Version, Agreement: digest, Sequence: seq, Order: what, Issued: time.Now().UTC().Truncate(time.Second), Reason: "an experiment"}
		if err := o.Sign(key); err != nil {
			return nil, err
		}
		return o, b.obey(ctx, o)
	}
	seq := uint64(time.Now().UnixNano())
	for _, who := range []ed25519.PrivateKey{monitor, ed25519.NewKeyFromSeed(make([]byte, 32))} {
		if _, err := order(access.Pause, seq, who); err == nil {
			return "", errors.New("somebody else than its owner has paused the agreement")
		}
		tries++
	}
	pause, err := order(access.Pause, seq+1, owner)
	if err != nil {
		return "", fmt.Errorf("the owner's pause: %w", err)
	}
	paused := time.Now()
	if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err == nil {
		return "", errors.New("what the agreement permits is done though its owner has paused it")
	}
	held := time.Since(paused)
	if _, err := order(access.Resume, seq+2, owner); err != nil {
		return "", fmt.Errorf("the owner's resume: %w", err)
	}
	if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
		return "", fmt.Errorf("after the owner's resume: %w", err)
	}
	if err := b.obey(ctx, pause); err == nil {
		return "", errors.New("an old pause works a second time")
	}
	tries++
	if a, err = now(); err != nil || a.Digest != digest {
		return "", fmt.Errorf("the agreement is another one now: %+v, %w", a, err)
	}
	return fmt.Sprintf("%d attempts refused; the owner's pause held at once (the next order was refused after %v)", tries, held.Round(time.Millisecond)), nil
}

func (b *bench) obey(ctx context.Context, o *access.Order) error {
	doc, err := json.Marshal(o)
	if err != nil {
		return err
	}
	return b.agent.ObeyOrder(ctx, doc)
}
