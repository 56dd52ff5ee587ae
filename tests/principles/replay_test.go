package principles

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// replayed shows old memory to the agent: all that there is, while the host stands still, as a recording would; and the pages of the kernel's log
// alone, under a host that goes on. What is planted is that nothing is put back.
func replayed(ctx context.Context, b *bench) (string, error) {
	if _, err := b.agent.WaitState(ctx, "a kernel that it has watched for a while", func(s engine.State) bool {
		return s.Phase == engine.Attached && s.Kernel != nil && time.Since(s.Kernel.BootTime) > 20*time.Second
	}); err != nil {
		return "", err
	}
	all, err := b.replayAll(ctx)
	if err != nil {
		return "", fmt.Errorf("the whole memory put back: %w", err)
	}
	log, err := b.replayLog(ctx)
	if err != nil {
		return "", fmt.Errorf("the log put back: %w", err)
	}
	return fmt.Sprintf("the whole memory: found after %.1f s; the pages of the log alone: after %.1f s", all.Seconds(), log.Seconds()), nil
}

// earlier waits for a finding, of one of these keys, that something of the host's is of an earlier time, and returns how long it took.
func (b *bench) earlier(ctx context.Context, before []detect.Finding, keys ...string) (time.Duration, error) {
	began, wait := time.Now(), 40*time.Second
	if b.calm {
		wait = 15 * time.Second
	}
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("it is not found within %v", wait))
	defer cancel()
	_, err := b.agent.WaitFinding(ctx, func(f detect.Finding) bool {
		return f.Kind == detect.KindTampering && slices.Contains(keys, f.Key) && !slices.ContainsFunc(before, func(g detect.Finding) bool { return g.ID == f.ID })
	})
	if err != nil {
		return 0, fmt.Errorf("%w; %s", err, b.condition(ctx))
	}
	return time.Since(began), nil
}

// while does something while the host stands still.
func (b *bench) while(ctx context.Context, do func() error) error {
	if err := b.host.Freeze(ctx); err != nil {
		return err
	}
	return errors.Join(do(), b.host.Thaw(context.WithoutCancel(ctx)))
}

func (b *bench) replayAll(ctx context.Context) (took time.Duration, err error) {
	before, err := b.agent.Findings(ctx)
	if err != nil {
		return 0, err
	}
	path, size := b.host.RAM()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(m)
	var old []byte
	if err := b.while(ctx, func() error { old = bytes.Clone(m); return nil }); err != nil {
		return 0, err
	}
	st, err := b.agent.State(ctx)
	if err != nil {
		return 0, err
	}
	// The host goes on for as long as the replay goes back.
	for end := time.Now().Add(6 * time.Second); time.Now().Before(end); {
		if _, err := b.host.Exec(ctx, "for i in 1 2 3; do /bin/true; done; sleep 0.5"); err != nil {
			return 0, err
		}
	}
	if _, err := b.agent.WaitState(ctx, "passes of the agent meanwhile", func(s engine.State) bool { return s.Passes >= st.Passes+5 || s.Passes < st.Passes }); err != nil {
		return 0, err
	}
	// What differs is changed and nothing else, so that all of it is done at once.
	type page struct {
		at  int
		now []byte
	}
	var changed []page
	err = b.while(ctx, func() (err error) {
		for at := 0; at < len(m); at += hostmem.PageSize {
			if was := old[at : at+hostmem.PageSize]; !bytes.Equal(m[at:at+hostmem.PageSize], was) {
				changed = append(changed, page{at, bytes.Clone(m[at : at+hostmem.PageSize])})
			}
		}
		if !b.calm {
			for _, p := range changed {
				copy(m[p.at:], old[p.at:p.at+hostmem.PageSize])
			}
		}
		defer func() {
			for _, p := range changed {
				copy(m[p.at:], p.now)
			}
		}()
		took, err = b.earlier(ctx, before, "clock-back", "log-back", "forks-back") // the clock stands where an agent must attach anew first
		return err
	})
	return took, err
}

// replayLog puts the pages of the printk ring (struct printk_ringbuffer, kernel/printk/printk_ringbuffer.h) back as they were some records ago. The
// kernel goes on from there.
func (b *bench) replayLog(ctx context.Context) (time.Duration, error) {
	mem, err := b.ram()
	if err != nil {
		return 0, err
	}
	defer mem.Close()
	w, ok := hostmem.AsWriter(mem)
	if !ok {
		return 0, errors.New("the RAM file is read-only")
	}
	img, err := kernel.Open(ctx, mem, kernel.Options{})
	if err != nil {
		return 0, err
	}
	ring, err := logPages(ctx, img)
	if err != nil {
		return 0, err
	}
	old := make(map[hostmem.PhysAddr][]byte)
	if err := b.while(ctx, func() error {
		for _, r := range ring {
			p := make([]byte, r.Size)
			if _, err := mem.ReadAt(p, int64(r.Start)); err != nil {
				return err
			}
			old[r.Start] = p
		}
		return nil
	}); err != nil {
		return 0, err
	}
	if r, err := b.host.Exec(ctx, "for i in $(seq 200); do echo what root did, $i >/dev/kmsg; done"); err != nil || r.Code != 0 {
		return 0, fmt.Errorf("write into the log: %w: %s", err, r.Stderr)
	}
	// The agent has seen what is to be hidden.
	for {
		log, err := b.agent.Dmesg(ctx)
		if err != nil {
			return 0, err
		}
		if n := len(log.Records); n > 0 && strings.Contains(log.Records[n-1].Text, "what root did") {
			break
		}
	}
	st, err := b.agent.State(ctx)
	if err != nil {
		return 0, err
	}
	ran := func(s engine.State) (n uint64) {
		for _, d := range s.Detectors {
			if d.ID == "logged" { // each look at the log has it run
				n = d.Runs
			}
		}
		return n
	}
	if _, err := b.agent.WaitState(ctx, "looks at the log", func(s engine.State) bool { return ran(s) >= ran(st)+2 || ran(s) < ran(st) }); err != nil {
		return 0, err
	}
	before, err := b.agent.Findings(ctx)
	if err != nil {
		return 0, err
	}
	if err := b.while(ctx, func() error {
		if b.calm {
			return nil
		}
		for at, p := range old {
			if _, err := w.WriteAt(p, int64(at)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return 0, err
	}
	return b.earlier(ctx, before, "log-back")
}

// logPages is where the kernel's log is: the ring's own record, its descriptors, what they say of the records, the text.
func logPages(ctx context.Context, img *kernel.Image) ([]hostmem.Range, error) {
	v := img.View(ctx)
	defer v.Close()
	at, err := img.Symbol("prb")
	if err != nil {
		return nil, err
	}
	rb, err := v.Uint64(at)
	if err != nil {
		return nil, err
	}
	get := func(path string) (uint64, error) {
		f, err := img.Field("printk_ringbuffer", path)
		if err != nil {
			return 0, err
		}
		p := make([]byte, 8)
		if err := v.ReadVirt(kernel.VirtAddr(rb+f.Offset), p[:min(f.Size, 8)]); err != nil {
			return 0, err
		}
		return binary.LittleEndian.Uint64(p), nil
	}
	size := func(typ string) uint64 {
		n, serr := img.Sizeof(typ)
		err = errors.Join(err, serr)
		return n
	}
	var x [5]uint64
	for i, path := range []string{"desc_ring.count_bits", "desc_ring.descs", "desc_ring.infos", "text_data_ring.size_bits", "text_data_ring.data"} {
		if x[i], err = get(path); err != nil {
			return nil, err
		}
	}
	if x[0] > 24 || x[3] > 24 {
		return nil, fmt.Errorf("a log of 2^%d records and 2^%d bytes", x[0], x[3])
	}
	var all []hostmem.Range
	for _, part := range []struct{ at, size uint64 }{
		{rb, size("printk_ringbuffer")}, {x[1], size("prb_desc") << x[0]}, {x[2], size("printk_info") << x[0]}, {x[4], 1 << x[3]},
	} {
		for done := uint64(0); done < part.size; {
			n := min(part.size-done, hostmem.PageSize-(part.at+done)%hostmem.PageSize)
			pa, perr := v.Phys(kernel.VirtAddr(part.at + done))
			if perr != nil {
				return nil, perr
			}
			all = append(all, hostmem.Range{Start: pa, Size: n})
			done += n
		}
	}
	return all, err
}
