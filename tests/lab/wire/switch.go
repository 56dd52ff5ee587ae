// Package wire is an Ethernet switch in one process: the cable between the lab's machines and its Go programs.
//
// A port is a pair of datagram sockets whose far end QEMU gets ("-netdev dgram"), an in-process endpoint, or a
// connection of another process. Whole frames of up to 9018 bytes pass (MTU 9000), without privileges. The switch learns
// addresses as IEEE 802.1Q bridges do, floods what it does not know, writes all frames to a capture file on demand, and
// can lose, double and reorder frames on their way out of a port: by chance, but the same for the same seed.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MTU is the largest payload of a frame in bytes.
	MTU = 9000
	// MaxFrame is the largest frame in bytes, with one VLAN tag and without the check sequence, which no virtual wire has.
	MaxFrame = 14 + 4 + MTU

	header   = 14              // destination, source, EtherType
	queue    = 1024            // frames that wait to leave a port; more are dropped, as in any switch
	learnt   = 4096            // addresses
	forget   = 5 * time.Minute // IEEE 802.1Q's default ageing time
	holdBack = 5 * time.Millisecond
)

// MAC is an Ethernet address.
type MAC [6]byte

// String returns the address as 02:00:00:00:00:01.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

func (m MAC) group() bool { return m[0]&1 != 0 }

// Impair says what happens to frames on their way out of a port. Each field is a probability from 0 to 1.
type Impair struct {
	Loss      float64
	Duplicate float64
	Reorder   float64 // the frame leaves after its successor, or 5 ms later if there is none
}

// Counters are a port's, in frames.
type Counters struct {
	In, Out    uint64 // from the machine into the switch; from the switch to the machine
	Dropped    uint64 // the machine was too slow to take them, or they were no Ethernet frames
	Lost       uint64 // by Impair
	Duplicated uint64
	Reordered  uint64
}

// Options tune a Switch. The zero value works.
type Options struct {
	// Capture, if not nil, gets each frame once, as it enters the switch, in pcap format.
	Capture io.Writer
	// Seed makes the impairments repeatable.
	Seed uint64
	// Hub sends every frame out of all other ports, as a cable does, and learns no addresses: who forges them cannot turn frames aside.
	Hub bool
}

// Switch forwards frames between its ports until Close. It is safe for concurrent use.
type Switch struct {
	seed uint64
	hub  bool

	capture *capture // nil if there is none

	mu     sync.Mutex
	ports  map[*Port]bool // guarded by mu
	table  map[MAC]entry  // guarded by mu
	serial uint64         // guarded by mu
	closed bool           // guarded by mu
	taps   map[*Tap]bool  // guarded by mu
	ends   []io.Closer    // guarded by mu; listeners
}

type entry struct {
	port *Port
	seen time.Time
}

// New makes a switch without ports.
func New(o Options) (*Switch, error) {
	s := &Switch{seed: o.Seed, hub: o.Hub, ports: make(map[*Port]bool), table: make(map[MAC]entry), taps: make(map[*Tap]bool)}
	if o.Capture != nil {
		c, err := newCapture(o.Capture)
		if err != nil {
			return nil, err
		}
		s.capture = c
	}
	return s, nil
}

// Close closes all ports.
func (s *Switch) Close() error {
	s.mu.Lock()
	s.closed = true
	var ports []*Port
	for p := range s.ports {
		ports = append(ports, p)
	}
	ends := s.ends
	s.ends = nil
	s.mu.Unlock()
	var errs []error
	for _, e := range ends {
		errs = append(errs, e.Close())
	}
	for _, p := range ports {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// Port is where one machine is plugged in.
type Port struct {
	Name string

	s    *Switch
	link link
	out  chan []byte
	done chan struct{}
	stop sync.Once
	dice *rand.Rand // used by the sender alone

	mu       sync.Mutex
	impair   Impair   // guarded by mu
	counters Counters // guarded by mu
}

// link carries whole frames to and from a machine. Close ends both directions.
type link interface {
	io.ReadWriteCloser
}

var errClosed = fmt.Errorf("wire: %w", net.ErrClosed)

func (s *Switch) attach(name string, l link) (*Port, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		l.Close()
		return nil, errClosed
	}
	s.serial++
	p := &Port{
		Name: name, s: s, link: l, out: make(chan []byte, queue), done: make(chan struct{}),
		dice: rand.New(rand.NewPCG(s.seed, s.serial)),
	}
	s.ports[p] = true
	go p.receive()
	go p.send()
	return p, nil
}

// Socket adds a port for a program that gets the returned file as its end: each datagram on it is a frame. QEMU takes it
// with "-netdev dgram,id=ID,local.type=fd,local.str=FD". The caller closes its copy once the program has started.
func (s *Switch) Socket(name string) (*Port, *os.File, error) {
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("wire: make a port: %w", err)
	}
	near, far := os.NewFile(uintptr(fd[0]), "wire-"+name), os.NewFile(uintptr(fd[1]), "wire-"+name)
	p, err := s.attach(name, near)
	if err != nil {
		far.Close()
		return nil, nil, err
	}
	return p, far, nil
}

// Impair changes what happens to frames that leave the port.
func (p *Port) Impair(i Impair) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.impair = i
}

// Counters returns what the port has counted so far.
func (p *Port) Counters() Counters {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counters
}

// Close unplugs the port.
func (p *Port) Close() error {
	var err error
	p.stop.Do(func() {
		p.s.mu.Lock()
		delete(p.s.ports, p)
		for m, e := range p.s.table {
			if e.port == p {
				delete(p.s.table, m)
			}
		}
		p.s.mu.Unlock()
		close(p.done)
		err = p.link.Close()
	})
	return err
}

func (p *Port) count(f func(*Counters)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.counters)
}

// receive takes frames from the machine for as long as it has any.
func (p *Port) receive() {
	defer p.Close()
	buf := make([]byte, MaxFrame+1)
	for {
		n, err := p.link.Read(buf)
		if err != nil {
			return
		}
		if n < header || n > MaxFrame {
			p.count(func(c *Counters) { c.Dropped++ })
			continue
		}
		p.count(func(c *Counters) { c.In++ })
		p.s.forward(p, append([]byte(nil), buf[:n]...))
	}
}

// forward sends a frame on; it owns the frame, which no one changes any more.
func (s *Switch) forward(from *Port, frame []byte) {
	now := time.Now()
	if s.capture != nil {
		s.capture.frame(now, frame)
	}
	dst, src := MAC(frame[:6]), MAC(frame[6:12])
	s.mu.Lock()
	for t := range s.taps {
		t.see(frame)
	}
	if !src.group() && !s.hub {
		if _, known := s.table[src]; known || len(s.table) < learnt {
			s.table[src] = entry{from, now}
		}
	}
	var to []*Port
	if e, ok := s.table[dst]; ok && !dst.group() && now.Sub(e.seen) < forget {
		if e.port != from {
			to = append(to, e.port)
		}
	} else {
		for p := range s.ports {
			if p != from {
				to = append(to, p)
			}
		}
	}
	s.mu.Unlock()
	for _, p := range to {
		select {
		case p.out <- frame:
		default:
			p.count(func(c *Counters) { c.Dropped++ })
		}
	}
}

// send hands frames to the machine, impaired.
func (p *Port) send() {
	var held []byte // a frame that lets its successor pass
	late := time.NewTimer(time.Hour)
	defer late.Stop()
	for {
		var frame []byte
		select {
		case <-p.done:
			return
		case <-late.C:
			if held != nil {
				p.write(held)
				held = nil
			}
			continue
		case frame = <-p.out:
		}
		p.mu.Lock()
		im := p.impair
		p.mu.Unlock()
		// All three dice are thrown for each frame, so that one probability does not change what another one hits.
		lost, twice, after := p.dice.Float64() < im.Loss, p.dice.Float64() < im.Duplicate, p.dice.Float64() < im.Reorder
		switch {
		case lost:
			p.count(func(c *Counters) { c.Lost++ })
		case after && held == nil:
			p.count(func(c *Counters) { c.Reordered++ })
			held = frame
			late.Reset(holdBack)
			continue
		default:
			p.write(frame)
			if twice {
				p.count(func(c *Counters) { c.Duplicated++ })
				p.write(frame)
			}
		}
		if held != nil {
			p.write(held)
			held = nil
		}
	}
}

func (p *Port) write(frame []byte) {
	if _, err := p.link.Write(frame); err != nil {
		p.count(func(c *Counters) { c.Dropped++ })
		return
	}
	p.count(func(c *Counters) { c.Out++ })
}

// capture writes pcap with times in nanoseconds (draft-ietf-opsawg-pcap, section 4).
type capture struct {
	mu sync.Mutex
	w  io.Writer // guarded by mu; nil after an error
}

func newCapture(w io.Writer) (*capture, error) {
	const magicNano, linkEthernet = 0xa1b23c4d, 1
	h := binary.LittleEndian.AppendUint32(nil, magicNano)
	h = binary.LittleEndian.AppendUint16(h, 2)
	h = binary.LittleEndian.AppendUint16(h, 4)
	h = append(h, make([]byte, 8)...)
	h = binary.LittleEndian.AppendUint32(h, 1<<16)
	h = binary.LittleEndian.AppendUint32(h, linkEthernet)
	if _, err := w.Write(h); err != nil {
		return nil, fmt.Errorf("wire: start the capture: %w", err)
	}
	return &capture{w: w}, nil
}

func (c *capture) frame(at time.Time, frame []byte) {
	r := make([]byte, 0, 16+len(frame))
	r = binary.LittleEndian.AppendUint32(r, uint32(at.Unix()))
	r = binary.LittleEndian.AppendUint32(r, uint32(at.Nanosecond()))
	r = binary.LittleEndian.AppendUint32(r, uint32(len(frame)))
	r = binary.LittleEndian.AppendUint32(r, uint32(len(frame)))
	r = append(r, frame...)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.w == nil {
		return
	}
	if _, err := c.w.Write(r); err != nil {
		c.w = nil // a full disk must not stop the traffic
	}
}
