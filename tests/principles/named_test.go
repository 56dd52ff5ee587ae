package principles

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// succeed has owner and monitor put a changed agreement in the place of the one that holds.
func (b *bench) succeed(ctx context.Context, id string, change func(*access.Agreement)) error {
	st, err := b.agent.State(ctx)
	if err != nil {
		return err
	}
	if st.Agreement == nil {
		return errors.New("the agent has no agreement")
	}
	next := *b.held
	next.ID, next.Succeeds, next.Signatures, next.Endorsements, next.Host.Key = id, st.Agreement.Digest, nil, nil, nil
	change(&next)
	for _, who := range []string{"owner", "monitor"} {
		k, err := b.lab.Key(who)
		if err == nil {
			err = next.Sign(k)
		}
		if err != nil {
			return err
		}
	}
	raw, err := json.Marshal(next)
	if err != nil {
		return err
	}
	if err := b.agent.OfferAgreement(ctx, raw); err != nil {
		return err
	}
	b.held = &next
	return nil
}

var errOther = errors.New("the RAM file has something else")

// fat starts a process on the host that has some memory of its own, and returns a page of that. What the kernel's image has been freed of is given to
// processes, too, the first ones above all; the agent takes all of the image for the kernel's.
func (b *bench) fat(ctx context.Context, img *kernel.Image) (control.Process, uint64, error) {
	if r, err := b.host.Exec(ctx, "[ -p /tmp/never ] || mkfifo /tmp/never; chmod 666 /tmp/never"); err != nil || r.Code != 0 {
		return control.Process{}, 0, fmt.Errorf("%w: %s", err, r.Stderr)
	}
	p, err := b.host.Spawn(ctx, control.SpawnArgs{Comm: "fat", CPU: -1, UID: 1234, Argv: []string{"sh", "-c", "x=$(head -c 8000000 /dev/zero | tr '\\0' a); read y <>/tmp/never"}})
	if err != nil {
		return p, 0, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("it does not get its memory within a minute"))
	defer cancel()
	image, _ := img.Spans()
	var was []hostmem.Range
	for same := 0; ; {
		v := img.View(ctx)
		m, err := v.UserMemory(p.PID)
		var pages []hostmem.Range
		if err == nil {
			pages, err = m.Present(true)
		}
		v.Close()
		// It has what it waits with when that stays as it is.
		if same++; err != nil || !slices.Equal(pages, was) {
			was, same = pages, 0
		}
		for _, r := range pages {
			if out := r.End() <= image.Phys || r.Start >= image.Phys+hostmem.PhysAddr(image.Size); same >= 5 && out && r.Size >= 1<<20 {
				return p, uint64(r.Start) + 8*hostmem.PageSize, nil
			}
		}
		select {
		case <-ctx.Done():
			return p, 0, fmt.Errorf("a process with memory: %w, %w", context.Cause(ctx), err)
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// named leases to a monitor what the agreement gives by name, over Redfish and over RDMA: it is what the RAM file has there, and what lies outside is refused.
// What is planted is that the agreement gives all memory.
func named(ctx context.Context, b *bench) (_ string, err error) {
	mem, err := b.ram()
	if err != nil {
		return "", err
	}
	defer mem.Close()
	img, err := kernel.Open(ctx, mem, kernel.Options{})
	if err != nil {
		return "", err
	}
	v := img.View(ctx)
	defer v.Close()
	owner, process, err := b.fat(ctx, img)
	if err != nil {
		return "", err
	}
	defer b.host.Exec(context.WithoutCancel(ctx), fmt.Sprintf("kill -9 %d 2>/dev/null", owner.PID))
	was, uid := b.held.Rights, owner.UID
	if err := b.succeed(ctx, "named", func(a *access.Agreement) {
		a.Rights.Memory = []access.Memory{
			{KernelText: true, Read: true}, {Symbol: "linux_banner", Size: 64, Read: true}, {Process: &access.Process{UID: &uid, Comm: owner.Comm}, Read: true, Write: true},
		}
		if b.calm {
			a.Rights.Memory = []access.Memory{{All: true, Read: true}}
		}
	}); err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, b.succeed(context.WithoutCancel(ctx), "lab-again", func(a *access.Agreement) { a.Rights = was }))
	}()
	place := func(symbol string) (uint64, error) {
		va, err := img.Symbol(symbol)
		if err != nil {
			return 0, err
		}
		pa, err := v.Phys(va)
		return uint64(pa), err
	}
	var at [4]uint64
	for i, symbol := range []string{"_stext", "_etext", "linux_banner", "init_task"} {
		if at[i], err = place(symbol); err != nil {
			return "", err
		}
	}
	text, etext, banner, task := at[0], at[1], at[2], at[3]
	c, err := b.lender(ctx)
	if err != nil {
		return "", err
	}
	if _, err := b.health(ctx); err != nil {
		return "", err
	}
	is := func(start uint64, got []byte) error {
		want := make([]byte, len(got))
		if _, err := mem.ReadAt(want, int64(start)); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%w at %#x", errOther, start)
		}
		return nil
	}
	byRedfish := func(start uint64, n int64, write bool) error {
		l, err := c.LeaseMemory(ctx, client.LeaseRequest{Start: start, Length: n, Write: write})
		if err != nil {
			return err
		}
		defer c.EndLease(context.WithoutCancel(ctx), l)
		var got bytes.Buffer
		if err := c.ReadMemory(ctx, l, start, n, &got); err != nil {
			return err
		}
		if got.Len() != int(n) {
			return fmt.Errorf("%d bytes of %d", got.Len(), n)
		}
		return is(start, got.Bytes())
	}
	dial := b.dialMemory(c)
	byRDMA := func(start uint64, n int64, write bool) error {
		qp, l, err := dial(ctx, b.monitor.NewPD(), nil, export.Request{Kind: export.KindMemory, Start: start, Length: uint64(n), Write: write})
		if err != nil {
			return err
		}
		defer qp.Close()
		got := make([]byte, n)
		if err := qp.Read(ctx, got, start, l.RKey); err != nil {
			return err
		}
		return is(start, got)
	}
	given, refused := 0, 0
	for _, x := range []struct {
		what  string
		start uint64
		n     int64
		write bool
		ok    bool
	}{
		{"the kernel's text", text, hostmem.PageSize, false, true},
		{"the end of the kernel's text", etext - 256, 256, false, true},
		{"past the kernel's text", etext - 128, 256, false, false},
		{"the kernel's text, to store there", text, 64, true, false},
		{"a symbol", banner, 64, false, true},
		{"past the symbol", banner, 72, false, false},
		{"another symbol", task, 64, false, false},
		{"memory of the process", process, hostmem.PageSize, true, true},
		{"memory of nobody's", uint64(img.Info().Note) &^ (hostmem.PageSize - 1), 64, false, false},
	} {
		for how, reach := range map[string]func(uint64, int64, bool) error{"Redfish": byRedfish, "RDMA": byRDMA} {
			err := reach(x.start, x.n, x.write)
			for range 5 { // its process may store there meanwhile
				if x.ok && errors.Is(err, errOther) {
					err = reach(x.start, x.n, x.write)
				}
			}
			switch {
			case x.ok && err != nil:
				return "", fmt.Errorf("%s, %d bytes at %#x by %s: %w", x.what, x.n, x.start, how, err)
			case !x.ok && err == nil:
				return "", fmt.Errorf("%s, %d bytes at %#x by %s, is given", x.what, x.n, x.start, how)
			case x.ok:
				given++
			default:
				refused++
			}
		}
	}
	// A lease of a process's memory ends with the process, though it has not expired.
	qp, l, err := dial(ctx, b.monitor.NewPD(), nil, export.Request{Kind: export.KindMemory, Start: process, Length: hostmem.PageSize})
	if err != nil {
		return "", err
	}
	defer qp.Close()
	if err := qp.Read(ctx, make([]byte, 8), process, l.RKey); err != nil {
		return "", err
	}
	r, err := b.host.Exec(ctx, fmt.Sprintf("kill -9 %d; for i in $(seq 200); do [ -e /proc/%d ] || exit 0; usleep 50000; done; exit 1", owner.PID, owner.PID))
	if err != nil || r.Code != 0 {
		return "", fmt.Errorf("end the process: %w: %s%s", err, r.Stdout, r.Stderr)
	}
	if qp.Read(ctx, make([]byte, 8), process, l.RKey) == nil {
		return "", errors.New("memory of a process that has ended is read under an old lease")
	}
	late, cancel := context.WithTimeoutCause(ctx, 10*time.Second, errors.New("not within 10 s"))
	defer cancel()
	if _, err := b.agent.WaitState(late, "an agent that is attached", func(s engine.State) bool { return s.Phase == engine.Attached }); err != nil {
		return "", err
	}
	return fmt.Sprintf("the kernel's text, a symbol, a process: %d leases given and read as the RAM file has it, %d refused outside, by Redfish and by RDMA; a lease ended with its process", given, refused), nil
}
