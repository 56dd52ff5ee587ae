package principles

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// lasting are the processes of the host that do not come and go, by the host's own word.
func (b *bench) lasting(ctx context.Context) ([]int, error) {
	all, err := b.host.PS(ctx)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, p := range all {
		if !p.Kernel && !slices.Contains([]string{"sleep", "sh", "cat", "busybox", "base64"}, p.Comm) {
			pids = append(pids, p.PID)
		}
	}
	return pids, nil
}

// lookAnew attaches to the host's memory as an agent does that has never seen it. It must refuse, or see what is there: the kernel of that
// boot, and all its processes.
func (b *bench) lookAnew(ctx context.Context, mem hostmem.Memory, boot string) (string, error) {
	truth, err := b.lasting(ctx)
	if err != nil {
		return "", err
	}
	img, err := kernel.Open(ctx, mem, kernel.Options{})
	if err != nil {
		return "one that attaches anew refuses", nil
	}
	if got := img.Info().BootID; got != boot {
		return "", fmt.Errorf("one that attaches anew takes a kernel of boot %s for the host's, which is %s", got, boot)
	}
	var failed error
	for range 10 { // the host goes on meanwhile
		seen := map[int]bool{}
		failed = nil
		for t, err := range img.View(ctx).Tasks() {
			if err != nil {
				failed = err
				break
			}
			seen[t.PID] = true
		}
		if failed != nil {
			continue
		}
		if i := slices.IndexFunc(truth, func(pid int) bool { return !seen[pid] }); i >= 0 {
			return "", fmt.Errorf("one that attaches anew takes this kernel for sound, and does not see process %d", truth[i])
		}
		return fmt.Sprintf("one that attaches anew sees all %d processes", len(truth)), nil
	}
	return "one that attaches anew says that it cannot tell", nil
}

// edited has the host's root change tables of its kernel that others find their way by. It must be found, and whoever attaches meanwhile must not be led
// astray. What is planted is that nothing is changed, so that there is nothing to find.
func edited(what, symbol string, edit func(*memory, *kernel.Image) error) func(context.Context, *bench) (string, error) {
	return func(ctx context.Context, b *bench) (string, error) {
		before, err := b.agent.Findings(ctx)
		if err != nil {
			return "", err
		}
		// What the host had changed before the copy was taken, the copy has, too.
		if _, err := b.agent.WaitState(ctx, "a whole comparison with the copy of the kernel", func(s engine.State) bool {
			return s.Golden != nil && s.Golden.Rounds > 0
		}); err != nil {
			return "", err
		}
		boot := ""
		var anew string
		wait := 90 * time.Second // a round of the comparison takes 20 s
		if b.calm {
			wait = 45 * time.Second
		}
		return b.tamperFor(ctx, wait, func(m *memory, img *kernel.Image) error {
			boot = img.Info().BootID
			if b.calm {
				return nil
			}
			return edit(m, img)
		}, func(ctx context.Context, since time.Time) (string, error) {
			mem, err := b.ram()
			if err != nil {
				return "", err
			}
			defer mem.Close()
			if anew, err = b.lookAnew(ctx, mem, boot); err != nil {
				return "", fmt.Errorf("with the %s changed: %w", what, err)
			}
			f, err := b.agent.WaitFinding(ctx, func(f detect.Finding) bool {
				return f.Kind == detect.KindTampering && strings.Contains(f.Title, symbol) && !slices.ContainsFunc(before, func(g detect.Finding) bool { return g.ID == f.ID })
			})
			if err != nil {
				return "", fmt.Errorf("the changed %s is not found (%s): %w; %s", what, anew, err, b.condition(ctx))
			}
			return fmt.Sprintf("found after %.1f s: %s; meanwhile %s", time.Since(since).Seconds(), f.Title, anew), nil
		})
	}
}

// condition says how the agent's engine is, for an error message.
func (b *bench) condition(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	st, err := b.agent.State(ctx)
	if err != nil {
		return err.Error()
	}
	text, err := json.Marshal(st)
	return fmt.Sprintf("the agent's state is %s, %v", text, err)
}

var namesPlace = regexp.MustCompile(`SYMBOL\(kallsyms_names\)=([0-9a-f]+)`)

// editSymbols changes the names of the kernel's symbols.
func editSymbols(m *memory, img *kernel.Image) error {
	note := make([]byte, hostmem.PageSize)
	if _, err := m.ReadAt(note, int64(img.Info().Note)); err != nil {
		return err
	}
	found := namesPlace.FindSubmatch(note)
	if found == nil {
		return errors.New("the kernel's note does not say where its symbols are")
	}
	at, err := strconv.ParseUint(string(found[1]), 16, 64)
	if err != nil {
		return err
	}
	at = (at + 2*hostmem.PageSize) &^ (hostmem.PageSize - 1) // amidst the names
	pa, err := img.View(context.Background()).Phys(kernel.VirtAddr(at))
	if err != nil {
		return err
	}
	old := make([]byte, 256)
	if _, err := m.ReadAt(old, int64(pa)); err != nil {
		return err
	}
	slices.Reverse(old)
	return m.put(pa, old)
}

// editTypes moves the member "tasks" of struct task_struct by 8 bytes in the kernel's BTF (Documentation/bpf/btf.rst): a lie that parses.
func editTypes(m *memory, img *kernel.Image) error {
	v := img.View(context.Background())
	start, err := img.Symbol("__start_BTF")
	if err != nil {
		return err
	}
	btf := make([]byte, img.Info().BTFBytes)
	if err := v.ReadVirt(start, btf); err != nil {
		return err
	}
	le := binary.LittleEndian
	header := le.Uint32(btf[4:])
	types, strs := header+le.Uint32(btf[8:]), header+le.Uint32(btf[16:])
	name := bytes.Index(btf[strs:], []byte("\x00tasks\x00"))
	field, err := img.Field("task_struct", "tasks")
	if err != nil {
		return err
	}
	if name < 0 {
		return errors.New("no member of any type is called tasks")
	}
	n := 0
	for at := types; at+12 <= strs; at += 4 { // struct btf_member: name, type, offset in bits
		if le.Uint32(btf[at:]) != uint32(name+1) || le.Uint32(btf[at+8:]) != uint32(field.Offset*8) {
			continue
		}
		pa, err := v.Phys(start + kernel.VirtAddr(at+8))
		if err != nil {
			return err
		}
		if err := m.put(pa, le.AppendUint32(nil, uint32(field.Offset*8+64))); err != nil {
			return err
		}
		n++
	}
	if n == 0 {
		return errors.New("the member tasks of task_struct is not found in the kernel's BTF")
	}
	return nil
}

// plantKernels has the host's root fill memory with notes of kernels that are not there: copies of the real one's, some altered. The agent
// must go on with the real one, and whoever attaches anew must find it. What is planted is that the oracle has another boot.
func plantKernels(ctx context.Context, b *bench) (string, error) {
	mem, err := b.ram()
	if err != nil {
		return "", err
	}
	defer mem.Close()
	st, err := b.agent.State(ctx)
	if err != nil {
		return "", err
	}
	if st.Kernel == nil {
		return "", errors.New("the agent is not attached")
	}
	boot := st.Kernel.BootID
	page := uint64(st.Kernel.Note) &^ (hostmem.PageSize - 1)
	note := make([]byte, hostmem.PageSize)
	if _, err := mem.ReadAt(note, int64(page)); err != nil {
		return "", err
	}
	const copies = 32
	var planted []byte
	for _, change := range [][2]string{{"", ""}, {"OSRELEASE=6", "OSRELEASE=9"}, {"KERNELOFFSET=", "KERNELOFFSET=1"}, {"SYMBOL(init_uts_ns)=ffffffff", "SYMBOL(init_uts_ns)=fffffffe"}} {
		lie := bytes.Replace(note, []byte(change[0]), []byte(change[1]), 1)[:hostmem.PageSize]
		if change[0] != "" && bytes.Equal(lie, note) {
			return "", fmt.Errorf("the note has no %q", change[0])
		}
		planted = append(planted, lie...)
	}
	r, err := b.host.Exec(ctx, "base64 -d >/tmp/lie <<'EOF'\n"+base64.StdEncoding.EncodeToString(planted)+"\nEOF\nfor i in $(seq "+strconv.Itoa(copies)+"); do cat /tmp/lie; done >/tmp/lies; wc -c </tmp/lies")
	if err != nil || strings.TrimSpace(r.Stdout) != strconv.Itoa(copies*len(planted)) {
		return "", fmt.Errorf("plant the notes: %w: %s%s", err, r.Stdout, r.Stderr)
	}
	defer b.host.Exec(context.WithoutCancel(ctx), "rm -f /tmp/lie /tmp/lies")
	path, _ := b.host.RAM()
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	there := 0
	for at := 0; at+hostmem.PageSize <= len(raw); at += hostmem.PageSize {
		if slices.ContainsFunc([]int{0, 1, 2, 3}, func(i int) bool {
			return bytes.Equal(raw[at:at+hostmem.PageSize], planted[i*hostmem.PageSize:(i+1)*hostmem.PageSize])
		}) {
			there++
		}
	}
	if there < copies {
		return "", fmt.Errorf("%d pages with notes are in the host's memory; %d were to be", there, 4*copies)
	}
	if b.calm {
		boot = "another"
	}
	anew, err := b.lookAnew(ctx, mem, boot)
	if err != nil {
		return "", err
	}
	late, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("not within a minute"))
	defer cancel()
	for {
		now, err := b.agent.State(late)
		if err != nil {
			return "", err
		}
		if now.Kernel != nil && now.Kernel.BootID != boot {
			return "", fmt.Errorf("the agent has gone over to boot %s", now.Kernel.BootID)
		}
		if now.Kernel != nil && now.Passes > st.Passes+20 {
			break
		}
		select {
		case <-late.Done():
			return "", context.Cause(late)
		case <-time.After(100 * time.Millisecond):
		}
	}
	return fmt.Sprintf("%d pages with notes of kernels: the agent stays; %s", there, anew), nil
}

// race has the host's root change a word back and forth without pause, by compare-and-swap, while the agent stores to it, as often as it is the word that
// the agent expects. Root counts how often it finds what the agent puts there: exactly as often as the agent says that it has stored. What is planted is a
// store of a stranger's.
func race(ctx context.Context, b *bench) (string, error) {
	st, err := b.agent.State(ctx)
	if err != nil {
		return "", err
	}
	if st.Kernel == nil {
		return "", errors.New("the agent is not attached")
	}
	// The page of the kernel's note has room behind it that the kernel does not use.
	page := uint64(st.Kernel.Note) &^ (hostmem.PageSize - 1)
	path, size := b.host.RAM()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if page+hostmem.PageSize > uint64(size) || page >= 2<<30 { // above, q35 has a hole
		return "", fmt.Errorf("the kernel's note is at %#x", page)
	}
	m, err := unix.Mmap(int(f.Fd()), int64(page), hostmem.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return "", err
	}
	defer unix.Munmap(m)
	const one, other, agents = 0x1111111111111111, 0x2222222222222222, 0x3333333333333333
	word := (*atomic.Uint64)(unsafe.Pointer(&m[hostmem.PageSize-64]))
	was := word.Load()
	word.Store(one)
	defer word.Store(was)
	var found, turns atomic.Int64
	stop, ended := make(chan struct{}), make(chan struct{})
	defer func() {
		close(stop)
		<-ended
	}()
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
			}
			switch v := word.Load(); {
			case v == one && word.CompareAndSwap(one, other), v == other && word.CompareAndSwap(other, one):
				turns.Add(1)
			case v == agents && word.CompareAndSwap(agents, one):
				found.Add(1)
			}
			time.Sleep(50 * time.Microsecond) // of the two processors one is left to others
		}
	}()
	c, err := b.lender(ctx)
	if err != nil {
		return "", err
	}
	l, err := c.LeaseMemory(ctx, client.LeaseRequest{Start: page, Length: hostmem.PageSize, Write: true})
	if err != nil {
		return "", err
	}
	defer c.EndLease(context.WithoutCancel(ctx), l)
	le := binary.LittleEndian
	stored, refused := int64(0), 0
	for range 40 {
		err := c.StoreMemory(ctx, l, page+hostmem.PageSize-64, le.AppendUint64(nil, one), le.AppendUint64(nil, agents))
		var e *client.Error
		switch {
		case err == nil:
			stored++
		case errors.As(err, &e) && e.Status >= 400 && e.Status < 500:
			refused++
		default:
			return "", err
		}
	}
	if b.calm {
		word.Store(agents)
	}
	for end := time.Now().Add(10 * time.Second); word.Load() == agents && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if got := found.Load(); got != stored {
		return "", fmt.Errorf("the agent says that it has stored %d times, and the host has found that %d times", stored, got)
	}
	if stored == 0 || refused == 0 {
		return "", fmt.Errorf("%d stores and %d refusals: there was no race", stored, refused)
	}
	return fmt.Sprintf("%d stores and %d refusals while the word changed %d times: each store was of the word expected, none was lost", stored, refused, turns.Load()), nil
}
