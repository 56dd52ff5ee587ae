package principles

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// ram opens the host's memory past the agent: as the host's own root has it.
func (b *bench) ram() (hostmem.Memory, error) {
	path, size := b.host.RAM()
	return hostmem.OpenRAMFile(path, hostmem.Q35Layout(uint64(size)), true)
}

// remote reads and stores host memory through the agent, and holds both against the RAM file.
func remote(ctx context.Context, b *bench) (string, error) {
	mem, err := b.ram()
	if err != nil {
		return "", err
	}
	defer mem.Close()
	img, err := kernel.Open(ctx, mem, kernel.Options{})
	if err != nil {
		return "", err
	}
	// The page of the kernel's note has room behind it that the kernel does not use.
	page := uint64(img.Info().Note) &^ (hostmem.PageSize - 1)
	at := page + hostmem.PageSize - 64
	c, err := b.lender(ctx)
	if err != nil {
		return "", err
	}
	l, err := c.LeaseMemory(ctx, client.LeaseRequest{Start: page, Length: hostmem.PageSize, Write: true})
	if err != nil {
		return "", err
	}
	defer c.EndLease(context.WithoutCancel(ctx), l)
	var got bytes.Buffer
	began := time.Now()
	if err := c.ReadMemory(ctx, l, page, hostmem.PageSize, &got); err != nil {
		return "", err
	}
	took := time.Since(began)
	want := make([]byte, hostmem.PageSize)
	if _, err := mem.ReadAt(want, int64(page)); err != nil {
		return "", err
	}
	if b.calm {
		want[17]++ // what is planted: the oracle has another byte
	}
	if !bytes.Equal(got.Bytes(), want) {
		return "", fmt.Errorf("the agent reads something else at %#x than the RAM file has", page)
	}
	old, put := make([]byte, 8), make([]byte, 8)
	copy(old, want[hostmem.PageSize-64:])
	rand.Read(put)
	if err := c.StoreMemory(ctx, l, at, old, put); err != nil {
		return "", err
	}
	now := make([]byte, 8)
	if _, err := mem.ReadAt(now, int64(at)); err != nil {
		return "", err
	}
	if !bytes.Equal(now, put) {
		return "", fmt.Errorf("the agent has stored %x at %#x, and the RAM file has %x", put, at, now)
	}
	// A store that expects what is no longer there must not happen.
	if err := c.StoreMemory(ctx, l, at, old, bytes.Repeat([]byte{0xee}, 8)); err == nil {
		return "", errors.New("a store is made where something else is than it expects")
	}
	lease, err := c.Lease(ctx, l.URI)
	if err != nil {
		return "", err
	}
	how := lease.Stores[len(lease.Stores)-1].How
	if err := c.UndoStores(ctx, l); err != nil {
		return "", err
	}
	if _, err := mem.ReadAt(now, int64(at)); err != nil || !bytes.Equal(now, old) {
		return "", fmt.Errorf("the undone store has left %x, %w", now, err)
	}
	return fmt.Sprintf("4096 bytes read in %v, 8 stored by %s and taken back, all as the RAM file has it", took.Round(time.Millisecond), how), nil
}

// memory is the host's, as its root has it: what it changes it can put back.
type memory struct {
	hostmem.Memory
	w    hostmem.Writer
	undo []func() error
}

// put changes bytes.
func (m *memory) put(at hostmem.PhysAddr, b []byte) error {
	old := make([]byte, len(b))
	if _, err := m.ReadAt(old, int64(at)); err != nil {
		return err
	}
	m.undo = append(m.undo, func() error { _, err := m.w.WriteAt(old, int64(at)); return err })
	_, err := m.w.WriteAt(b, int64(at))
	return err
}

// restore puts everything back, the latest first.
func (m *memory) restore() error {
	var errs []error
	for _, u := range slices.Backward(m.undo) {
		errs = append(errs, u())
	}
	m.undo = nil
	return errors.Join(errs...)
}

// tamper has the host's root do something to its own memory while the host stands still for a moment, and waits for what comes of it.
func (b *bench) tamper(ctx context.Context, do func(*memory, *kernel.Image) error, judge func(ctx context.Context, since time.Time) (string, error)) (string, error) {
	return b.tamperFor(ctx, 30*time.Second, do, judge)
}

func (b *bench) tamperFor(ctx context.Context, wait time.Duration, do func(*memory, *kernel.Image) error, judge func(ctx context.Context, since time.Time) (string, error)) (figure string, err error) {
	mem, err := b.ram()
	if err != nil {
		return "", err
	}
	defer mem.Close()
	w, ok := hostmem.AsWriter(mem)
	if !ok {
		return "", errors.New("the RAM file is read-only")
	}
	img, err := kernel.Open(ctx, mem, kernel.Options{})
	if err != nil {
		return "", err
	}
	m := &memory{Memory: mem, w: w}
	still := func(f func() error) error {
		if err := b.host.Freeze(ctx); err != nil {
			return err
		}
		return errors.Join(f(), b.host.Thaw(context.WithoutCancel(ctx)))
	}
	began := time.Now()
	defer func() { err = errors.Join(err, still(m.restore)) }()
	if err := still(func() error { return do(m, img) }); err != nil {
		return "", err
	}
	judging, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("not within %v", wait))
	defer cancel()
	return judge(judging, began)
}

// unlink takes the process redis off the kernel's list of tasks, as a rootkit does.
func unlink(ctx context.Context, m *memory, img *kernel.Image) error {
	v := img.View(ctx)
	f, err := img.Field("task_struct", "tasks")
	if err != nil {
		return err
	}
	for t, err := range v.Tasks() {
		if err != nil {
			return err
		}
		if t.Comm != "redis" {
			continue
		}
		// list_del: the neighbours point past it (struct list_head: next, prev).
		at := t.Addr + kernel.VirtAddr(f.Offset)
		var node [16]byte
		if err := v.ReadVirt(at, node[:]); err != nil {
			return err
		}
		next, prev := kernel.VirtAddr(binary.LittleEndian.Uint64(node[:])), kernel.VirtAddr(binary.LittleEndian.Uint64(node[8:]))
		for _, s := range []struct{ at, put kernel.VirtAddr }{{prev, next}, {next + 8, prev}} {
			pa, err := v.Phys(s.at)
			if err != nil {
				return err
			}
			if err := m.put(pa, binary.LittleEndian.AppendUint64(nil, uint64(s.put))); err != nil {
				return err
			}
		}
		return nil
	}
	return errors.New("the host has no process redis")
}

// hide hides a process; it must be found.
func hide(ctx context.Context, b *bench) (string, error) {
	before, err := b.agent.Findings(ctx)
	if err != nil {
		return "", err
	}
	return b.tamper(ctx, func(m *memory, img *kernel.Image) error {
		if b.calm {
			return nil
		}
		return unlink(ctx, m, img)
	}, func(ctx context.Context, since time.Time) (string, error) {
		f, err := b.agent.WaitFinding(ctx, func(f detect.Finding) bool {
			return f.Kind == detect.KindTampering && !slices.ContainsFunc(before, func(g detect.Finding) bool { return g.ID == f.ID })
		})
		if err != nil {
			return "", fmt.Errorf("it is not found: %w", err)
		}
		return fmt.Sprintf("found after %.1f s: %s", time.Since(since).Seconds(), f.Title), nil
	})
}

// renote overwrites the kernel's note, by which a stranger finds its way. The agent has found its way already: it must go on seeing what
// is there.
func renote(ctx context.Context, b *bench) (string, error) {
	return b.tamper(ctx, func(m *memory, img *kernel.Image) error {
		if b.calm {
			if err := unlink(ctx, m, img); err != nil {
				return err
			}
		}
		return m.put(img.Info().Note, bytes.Repeat([]byte{0x41}, 256))
	}, func(ctx context.Context, since time.Time) (string, error) {
		st, err := b.agent.State(ctx)
		if err != nil {
			return "", err
		}
		if _, err := b.agent.WaitState(ctx, "further passes", func(now engine.State) bool { return now.Passes > st.Passes+20 || now.Phase != engine.Attached }); err != nil {
			return "", err
		}
		if st, err = b.agent.State(ctx); err != nil {
			return "", err
		}
		if st.Phase != engine.Attached {
			return fmt.Sprintf("noticed after %.1f s: %s", time.Since(since).Seconds(), st.Why), nil
		}
		seen, err := b.agent.Tasks(ctx)
		if err != nil {
			return "", err
		}
		truth, err := b.host.PS(ctx)
		if err != nil {
			return "", err
		}
		n := 0
		for _, p := range truth {
			if p.Kernel || p.Comm == "sleep" || p.Comm == "sh" || p.Comm == "cat" {
				continue // come and go
			}
			n++
			if !slices.ContainsFunc(seen.Processes, func(q query.Process) bool { return q.PID == p.PID }) {
				return "", fmt.Errorf("the agent does not see %q, PID %d", p.Comm, p.PID)
			}
		}
		return fmt.Sprintf("no effect on an agent that is attached: it sees all %d processes", n), nil
	})
}

// lender returns the client of an account that may reach memory, which no predefined role may.
func (b *bench) lender(ctx context.Context) (*client.Client, error) {
	if b.memory != nil {
		return b.memory, nil
	}
	const user, password = "memory", "a long password 1"
	if _, err := b.agent.Post(ctx, "/redfish/v1/AccountService/Roles", map[string]any{
		"RoleId": "Memory", "AssignedPrivileges": []string{"Login", "ConfigureComponents", "ConfigureSelf"}, "OemPrivileges": []string{"BackdoorMemory"},
	}, nil); err != nil {
		return nil, err
	}
	if _, err := b.agent.Post(ctx, "/redfish/v1/AccountService/Accounts", map[string]any{"UserName": user, "Password": password, "RoleId": "Memory"}, nil); err != nil {
		return nil, err
	}
	c := b.agent.Config
	c.User, c.Password = user, password
	var err error
	b.memory, err = client.New(c)
	return b.memory, err
}
