package principles

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// A reach is a way to the host's memory, with what it can do; what it has not is nil.
type reach struct {
	name    string
	read    func(at uint64, b []byte) error
	write   func(at uint64, old, put []byte) error
	swap    func(at uint64, old, put uint64) (prev uint64, err error)
	add     func(at, by uint64) (prev uint64, err error)
	scatter func([]hostmem.Segment) error
	// registers tries to read a device's, which the agreement's ranges do not exclude.
	registers func() error
}

// reachOf is memory as a way to it.
func reachOf(name string, mem hostmem.Memory) reach {
	r := reach{name: name, read: func(at uint64, b []byte) error { _, err := mem.ReadAt(b, int64(at)); return err }}
	if w, ok := hostmem.AsWriter(mem); ok {
		r.write = func(at uint64, _, put []byte) error { _, err := w.WriteAt(put, int64(at)); return err }
	}
	if s, ok := hostmem.AsSwapper(mem); ok {
		r.swap = func(at, old, put uint64) (uint64, error) { return s.CompareAndSwap(hostmem.PhysAddr(at), old, put) }
	}
	r.registers = func() error { return r.read(deviceRegisters, make([]byte, 8)) }
	r.scatter = func(segs []hostmem.Segment) error { return hostmem.ReadScatter(mem, segs) }
	return r
}

// deviceRegisters is where a PC has its local APIC (Intel SDM volume 3, 11.4.1): no RAM, and nothing that may be touched by accident.
const deviceRegisters = 0xfee00000

// reaches opens every way that there is: by Redfish and by RDMA through the agent, whose own path is the PCI window; the RAM file; and the model of a DMA
// engine over that.
func (b *bench) reaches(ctx context.Context, page uint64) (all []reach, done func(), err error) {
	var closers []func()
	end := func() {
		for _, c := range slices.Backward(closers) {
			c()
		}
	}
	defer func() {
		if err != nil {
			end()
		}
	}()
	c, err := b.lender(ctx)
	if err != nil {
		return nil, nil, err
	}
	l, err := c.LeaseMemory(ctx, client.LeaseRequest{Start: page, Length: hostmem.PageSize, Write: true})
	if err != nil {
		return nil, nil, err
	}
	closers = append(closers, func() { c.EndLease(context.WithoutCancel(ctx), l) })
	window := reach{
		name: "PCI window, by Redfish",
		read: func(at uint64, p []byte) error {
			var got bytes.Buffer
			if err := c.ReadMemory(ctx, l, at, int64(len(p)), &got); err != nil {
				return err
			}
			if copy(p, got.Bytes()) != len(p) {
				return fmt.Errorf("%d bytes of %d", got.Len(), len(p))
			}
			return nil
		},
		write: func(at uint64, old, put []byte) error { return c.StoreMemory(ctx, l, at, old, put) },
		// A store is one of what is expected there; of a word it is a compare-and-swap.
		swap: func(at, old, put uint64) (uint64, error) {
			le := binary.LittleEndian
			err := c.StoreMemory(ctx, l, at, le.AppendUint64(nil, old), le.AppendUint64(nil, put))
			var e *client.Error
			if errors.As(err, &e) && e.Status >= 400 && e.Status < 500 {
				return ^old, nil // another word was there
			}
			return old, err
		},
	}
	if _, err := b.health(ctx); err != nil {
		return nil, nil, err
	}
	// Memory is leased over Redfish; the key alone does not do.
	dial := b.dialMemory(c)
	mem, err := export.OpenMemory(ctx, b.monitor, dial, export.Request{Start: page, Length: hostmem.PageSize, Write: true, Atomic: true})
	if err != nil {
		return nil, nil, fmt.Errorf("a lease of memory by RDMA: %w", err)
	}
	closers = append(closers, func() { mem.Close() })
	qp, lease, err := dial(ctx, b.monitor.NewPD(), nil, export.Request{Kind: export.KindMemory, Start: page, Length: hostmem.PageSize, Write: true, Atomic: true})
	if err != nil {
		return nil, nil, fmt.Errorf("a lease of memory by RDMA: %w", err)
	}
	closers = append(closers, func() { qp.Close() })
	rdma := reachOf("PCI window, by RDMA from a monitor", mem)
	rdma.add = func(at, by uint64) (uint64, error) { return qp.FetchAdd(ctx, at, lease.RKey, by) }
	rdma.registers = func() error {
		qp, l, err := dial(ctx, b.monitor.NewPD(), nil, export.Request{Kind: export.KindMemory, Start: deviceRegisters, Length: hostmem.PageSize})
		if err != nil {
			return err
		}
		defer qp.Close()
		return qp.Read(ctx, make([]byte, 8), deviceRegisters, l.RKey)
	}
	window.registers = func() error {
		l, err := c.LeaseMemory(ctx, client.LeaseRequest{Start: deviceRegisters, Length: hostmem.PageSize})
		if err != nil {
			return err
		}
		defer c.EndLease(context.WithoutCancel(ctx), l)
		return c.ReadMemory(ctx, l, deviceRegisters, 8, io.Discard)
	}
	file, err := b.ram()
	if err != nil {
		return nil, nil, err
	}
	closers = append(closers, func() { file.Close() })
	engine := hostmem.NewEngine(file, hostmem.EngineOptions{})
	return []reach{window, rdma, reachOf("DMA engine (model) over the RAM file", engine), reachOf("RAM file", file)}, end, nil
}

// dialMemory connects the monitor to memory that is leased over Redfish.
func (b *bench) dialMemory(c *client.Client) export.Dial {
	return export.DialLease(b.monitor, agentIP, func(ctx context.Context, r export.Request) (l export.Lease, err error) {
		got, err := c.LeaseRDMA(ctx, client.RDMARequest{
			Kind: r.Kind.String(), Peer: r.Peer.String(), QPN: uint32(r.QPN), PSN: uint32(r.PSN), PathMTU: r.PathMTU, Start: fmt.Sprintf("%#x", r.Start), Length: r.Length,
			Write: r.Write, Atomic: r.Atomic,
		})
		if err != nil {
			return l, err
		}
		start, err1 := strconv.ParseUint(got.Start, 0, 64)
		length, err2 := strconv.ParseUint(got.Length, 0, 64)
		return export.Lease{
			ID: got.ID, Kind: r.Kind, QPN: roce.QPN(got.QPN), PSN: roce.PSN(got.PSN), PathMTU: got.PathMTU, Expires: got.Expires, Write: got.Write, Atomic: got.Atomic,
			RKey: roce.RKey(got.RKey), Addr: start, Length: length, MapKey: roce.RKey(got.MapKey), MapLength: uint64(got.MapLength),
		}, errors.Join(err1, err2)
	})
}

// matrix does each operation on each way to the host's memory, and holds it against the bytes of the RAM file. What a way cannot do it must say, and the
// registers of the host's devices must be out of reach on all of them. What is planted is that the oracle has other bytes.
func matrix(ctx context.Context, b *bench) (string, error) {
	st, err := b.agent.State(ctx)
	if err != nil {
		return "", err
	}
	if st.Kernel == nil {
		return "", errors.New("the agent is not attached")
	}
	page := uint64(st.Kernel.Note) &^ (hostmem.PageSize - 1)
	path, _ := b.host.RAM()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	truth := func(at uint64, n int) ([]byte, error) {
		p := make([]byte, n)
		_, err := f.ReadAt(p, int64(at)) // below q35's hole an address is an offset
		if b.calm {
			p[n/2] ^= 1
		}
		return p, err
	}
	all, done, err := b.reaches(ctx, page)
	if err != nil {
		return "", err
	}
	defer done()
	le := binary.LittleEndian
	at := page + hostmem.PageSize - 128 // behind the note, where the kernel has nothing
	was, err := truth(at, 128)
	if err != nil {
		return "", err
	}
	if !b.calm {
		defer f.WriteAt(was, int64(at))
	}
	is := func(want []byte) error {
		got, err := truth(at, len(want))
		if err == nil && !bytes.Equal(got, want) {
			err = fmt.Errorf("the RAM file has %x, not %x", got, want)
		}
		return err
	}
	var said []string
	for _, r := range all {
		var row []string
		cell := func(op string, can bool, do func() error) error {
			if !can {
				row = append(row, op+" –")
				return nil
			}
			began := time.Now()
			if err := do(); err != nil {
				return fmt.Errorf("%s: %s: %w", r.name, op, err)
			}
			row = append(row, fmt.Sprintf("%s %v", op, time.Since(began).Round(10*time.Microsecond)))
			return nil
		}
		err := errors.Join(
			cell("read", true, func() error {
				got := make([]byte, hostmem.PageSize)
				if err := r.read(page, got); err != nil {
					return err
				}
				want, err := truth(page, len(got))
				if err == nil && !bytes.Equal(got, want) {
					err = errors.New("the RAM file has something else")
				}
				return err
			}),
			cell("write", r.write != nil, func() error {
				old := make([]byte, 64)
				if _, err := f.ReadAt(old, int64(at)); err != nil {
					return err
				}
				put := make([]byte, len(old))
				rand.Read(put)
				for i := 0; i < len(put); i += 8 { // by Redfish up to a word at once
					if err := r.write(at+uint64(i), old[i:i+8], put[i:i+8]); err != nil {
						return err
					}
				}
				return is(put)
			}),
			cell("compare-and-swap", r.swap != nil, func() error {
				old := make([]byte, 8)
				if _, err := f.ReadAt(old, int64(at)); err != nil {
					return err
				}
				word := le.Uint64(old)
				if prev, err := r.swap(at, ^word, 1); err != nil || prev == ^word {
					return fmt.Errorf("a swap that expects another word: it finds %#x, %w", prev, err)
				}
				if err := is(old); err != nil {
					return err
				}
				if prev, err := r.swap(at, word, word+7); err != nil || prev != word {
					return fmt.Errorf("it finds %#x, not %#x: %w", prev, word, err)
				}
				return is(le.AppendUint64(nil, word+7))
			}),
			cell("fetch-and-add", r.add != nil, func() error {
				old := make([]byte, 8)
				if _, err := f.ReadAt(old, int64(at)); err != nil {
					return err
				}
				word := le.Uint64(old)
				if prev, err := r.add(at, 1<<40+3); err != nil || prev != word {
					return fmt.Errorf("it finds %#x, not %#x: %w", prev, word, err)
				}
				return is(le.AppendUint64(nil, word+1<<40+3))
			}),
			cell("scatter", r.scatter != nil, func() error {
				segs := make([]hostmem.Segment, 32)
				for i := range segs {
					segs[i] = hostmem.Segment{Addr: hostmem.PhysAddr(page + uint64(i)*97), Buf: make([]byte, 1+i*13%200)}
				}
				if err := r.scatter(segs); err != nil {
					return err
				}
				for _, s := range segs {
					want, err := truth(uint64(s.Addr), len(s.Buf))
					if err != nil || !bytes.Equal(s.Buf, want) {
						return fmt.Errorf("at %v: %x, and the RAM file has %x, %w", s.Addr, s.Buf, want, err)
					}
				}
				return nil
			}),
			cell("I/O refused", true, func() error {
				if r.registers() == nil {
					return errors.New("a register of a device of the host's was read")
				}
				return nil
			}),
		)
		if err != nil {
			return "", err
		}
		said = append(said, r.name+": "+strings.Join(row, ", "))
	}
	return strings.Join(said, "; "), nil
}
