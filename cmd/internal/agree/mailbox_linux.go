package agree

import (
	"context"
	"fmt"
	"io"
	"math/bits"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/agent/access"
)

// hold keeps the document at the address where an agent looks for it, in memory that is not swapped out.
func hold(ctx context.Context, doc []byte, d time.Duration, stdout io.Writer) error {
	box, err := access.Mailbox(doc)
	if err != nil {
		return err
	}
	if bits.UintSize < 64 {
		return fmt.Errorf("a mailbox needs a machine of 64 bits; give the agent the file: %w", unix.ENOTSUP)
	}
	at := uint64(access.MailboxAddress)
	size := uintptr((len(box) + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1))
	p, err := unix.MmapPtr(-1, 0, unsafe.Add(nil, at), size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED_NOREPLACE|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("make the mailbox at %#x: %w", at, err)
	}
	defer func() { _ = unix.MunmapPtr(p, size) }()
	mem := unsafe.Slice((*byte)(p), size)
	if err := unix.Mlock(mem); err != nil {
		return fmt.Errorf("keep the mailbox in memory: %w", err)
	}
	copy(mem, box)
	// The agent knows the process by this name, whatever the program's file is called. The main thread has it.
	if err := os.WriteFile(fmt.Sprintf("/proc/self/task/%d/comm", os.Getpid()), []byte(access.MailboxComm), 0); err != nil {
		return fmt.Errorf("name the process: %w", err)
	}
	if _, err := fmt.Fprintf(stdout, "The document is in the mailbox for %v; the agent's log says when it has taken it.\n", d); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	return nil
}
