package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// gdb is a client of QEMU's debug stub: it stops the machine and changes a CPU's registers, which is how the lab breaks
// a stock kernel in ways that no user of it could.
//
// Source: "GDB Remote Serial Protocol" of the GDB manual; gdbstub.c and target/i386/gdbstub.c of QEMU 7.2.
type gdb struct {
	conn net.Conn
	in   *bufio.Reader
}

// command sends a packet and returns the answer to it. The news that the machine has stopped may come first.
func (g *gdb) command(packet string) (string, error) {
	if err := g.send(packet); err != nil {
		return "", err
	}
	for {
		s, err := g.receive()
		if err != nil || !strings.HasPrefix(s, "T") {
			return s, err
		}
	}
}

func (g *gdb) send(packet string) error {
	var sum byte
	for i := range len(packet) {
		sum += packet[i]
	}
	_, err := fmt.Fprintf(g.conn, "$%s#%02x", packet, sum)
	return err
}

// receive returns the next packet, and acknowledges it. The line is a local socket: nothing is ever lost or damaged.
func (g *gdb) receive() (string, error) {
	if _, err := g.in.ReadSlice('$'); err != nil {
		return "", err
	}
	p, err := g.in.ReadString('#')
	if err != nil {
		return "", err
	}
	if _, err := g.in.Discard(2); err != nil {
		return "", err
	}
	_, err = g.conn.Write([]byte("+"))
	return p[:len(p)-1], err
}

// x86-64 registers as QEMU's stub counts them.
const (
	regRIP    = 16
	regEFLAGS = 17
	regCS     = 18
)

func (g *gdb) register(n int) (uint64, error) {
	s, err := g.command(fmt.Sprintf("p%x", n))
	if err != nil {
		return 0, err
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) == 0 || len(b) > 8 {
		return 0, fmt.Errorf("register %d: unexpected answer %q", n, s)
	}
	return binary.LittleEndian.Uint64(append(b, make([]byte, 8-len(b))...)), nil
}

func (g *gdb) setRegister(n, size int, v uint64) error {
	b := binary.LittleEndian.AppendUint64(nil, v)[:size]
	s, err := g.command(fmt.Sprintf("P%x=%x", n, b))
	if err == nil && s != "OK" {
		err = fmt.Errorf("set register %d: %q", n, s)
	}
	return err
}

// find returns the address of the first occurrence of pattern in the 4 MiB around va that are readable.
func (g *gdb) find(va uint64, pattern []byte) (uint64, error) {
	const step = 1 << 10 // the stub's packets are limited to 4096 characters
	for off := uint64(0); off < 2<<20; off += step {
		for _, at := range []uint64{va&^(step-1) + off, va&^(step-1) - off} {
			s, err := g.command(fmt.Sprintf("m%x,%x", at, step))
			if err != nil {
				return 0, err
			}
			b, err := hex.DecodeString(s)
			if err != nil {
				continue // an error code: not mapped
			}
			if i := bytes.Index(b, pattern); i >= 0 {
				return at + uint64(i), nil
			}
		}
	}
	return 0, fmt.Errorf("%w % x near %#x", errNoPattern, pattern, va)
}

var errNoPattern = errors.New("no")

// attach opens the debug stub, which stops the machine.
func (h *Host) attach(ctx context.Context) (*gdb, func(), error) {
	p, err := reserve()
	if err != nil {
		return nil, nil, err
	}
	client, err := h.machine.client()
	if err != nil {
		p.release()
		return nil, nil, err
	}
	if out, err := client.Human(ctx, fmt.Sprintf("gdbserver tcp:%v", p)); err != nil {
		p.release()
		return nil, nil, fmt.Errorf("open the debug stub: %w (%s)", err, out)
	}
	stop := func() {
		client.Human(context.WithoutCancel(ctx), "gdbserver none") // if QEMU has ended, so has its stub
		p.release()
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", p.String())
	if err != nil {
		stop()
		return nil, nil, fmt.Errorf("open the debug stub: %w", err)
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(time.Minute)
	}
	conn.SetDeadline(deadline) // a TCP connection takes deadlines
	g := &gdb{conn, bufio.NewReader(conn)}
	leave := func() {
		conn.Close()
		stop()
		client.Execute(context.WithoutCancel(ctx), "cont", nil, nil) // no-op if it runs; gone if QEMU is
	}
	// Only a client that has asked for the description of the registers may read them one by one.
	if _, err := g.command("qXfer:features:read:target.xml:0,100"); err != nil {
		leave()
		return nil, nil, fmt.Errorf("open the debug stub: %w", err)
	}
	return g, leave, nil
}

// spin is "jmp ." of x86-64.
var spin = []byte{0xeb, 0xfe}

// irqsOff makes one CPU spin in the kernel with its interrupts off. A process keeps the CPU busy with system calls; as
// soon as the CPU is found inside the kernel with its interrupts on, its interrupt flag is cleared and it is sent to an
// endless loop. Whatever it holds at that moment stays held, as in a real lock-up.
func (h *Host) irqsOff(ctx context.Context, t *Truth) error {
	cpu := rand.IntN(h.Ready().CPUs)
	a := control.SpawnArgs{
		Comm: randomName(), CPU: cpu, UID: uint32(1000 + rand.IntN(60000)),
		Argv: []string{"dd", "if=/dev/zero", "of=/dev/null", "bs=1"},
	}
	p, err := h.Spawn(ctx, a)
	if err != nil {
		return err
	}
	g, detach, err := h.attach(ctx)
	if err != nil {
		return err
	}
	defer detach()
	// The stub counts CPUs from 1.
	if s, err := g.command(fmt.Sprintf("Hg%x", cpu+1)); err != nil || s != "OK" {
		return fmt.Errorf("choose CPU %d: %q: %w", cpu, s, err)
	}
	for range 2000 {
		ok, err := h.derail(g)
		if err != nil {
			return err
		}
		if ok {
			t.Start = time.Now()
			if s, err := g.command("D"); err != nil || s != "OK" {
				return fmt.Errorf("let the machine run: %q: %w", s, err)
			}
			t.Margin = time.Since(t.Start)
			t.CPU, t.PID, t.Comm, t.UID = cpu, p.PID, a.Comm, a.UID
			return nil
		}
		if err := g.send("c"); err != nil {
			return err
		}
		// Not a wait for anything: a moment of run, of random length, before the next look.
		time.Sleep(time.Duration(200+rand.IntN(2000)) * time.Microsecond)
		if _, err := g.conn.Write([]byte{3}); err != nil {
			return err
		}
		if _, err := g.receive(); err != nil { // the stop
			return err
		}
		if s, err := g.command(fmt.Sprintf("Hg%x", cpu+1)); err != nil || s != "OK" {
			return fmt.Errorf("choose CPU %d: %q: %w", cpu, s, err)
		}
	}
	return errors.New("the CPU was never found in the kernel: " + strconv.Itoa(cpu))
}

// derail sends the chosen CPU to the endless loop, if it is inside the kernel's own text with its interrupts on.
func (h *Host) derail(g *gdb) (bool, error) {
	cs, err := g.register(regCS)
	if err != nil {
		return false, err
	}
	rip, err := g.register(regRIP)
	if err != nil {
		return false, err
	}
	flags, err := g.register(regEFLAGS)
	if err != nil {
		return false, err
	}
	// The kernel's text is within 1 GiB from here (Documentation/x86/x86_64/mm.rst, Linux 6.1).
	const text, textEnd, interruptFlag = 0xffffffff80000000, 0xffffffffc0000000, 0x200
	if cs&3 != 0 || rip < text || rip >= textEnd || flags&interruptFlag == 0 {
		return false, nil
	}
	to, err := g.find(rip, spin)
	if errors.Is(err, errNoPattern) { // at its entries the kernel has the page tables of programs, which map little of it
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := g.setRegister(regEFLAGS, 4, flags&^interruptFlag); err != nil {
		return false, err
	}
	return true, g.setRegister(regRIP, 8, to)
}
