// Package interop serves the unmodified clients of perftest and rdma-core that judge a roce.Device in a lab.
//
// They do not authenticate themselves, and perftest gives its keys to everybody who connects over TCP: this package is
// for laboratories and never part of an image. It speaks what perftest 4.5 speaks: ib_read_lat, ib_read_bw,
// ib_write_bw, ib_atomic_lat and ib_atomic_bw, with keys exchanged over TCP or, with -R, over the connection manager; and
// rping as a client and as a server.
package interop

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/nicfw/roce/uverbs"
)

// Server gives clients access to one region.
type Server struct {
	Device *roce.Device
	Region roce.Region
	Length uint64 // of the region, bytes
	Access roce.Access
	QP     roce.QPConfig // Resources: 16 by default
	Log    *slog.Logger
	// Verbs, if not nil, serves perftest instead of Device; Region must then be a *roce.Buffer.
	Verbs *uverbs.Device
}

// recordLen is the length of perftest's key record with a GID (KEY_MSG_SIZE_GID in perftest_communication.h).
const recordLen = 108

// record is what one side of perftest tells the other about itself:
// lid:out_reads:qpn:psn:rkey:vaddr:gid:srqn, in hexadecimal.
type record struct {
	outReads int
	qpn      roce.QPN
	psn      roce.PSN
	rkey     roce.RKey
	va       uint64
	gid      netip.Addr
}

// recordBits are the widths of the first fields: lid, out_reads, qpn, psn, rkey, vaddr. A record of such numbers, the GID
// and a queue number of 32 bits fills recordLen with its final zero.
var recordBits = [6]int{16, 16, 24, 24, 32, 64}

// errRecord is wrapped by errors about what a client sent.
var errRecord = errors.New("not a record of perftest 4.5")

func parseRecord(b []byte) (r record, err error) {
	fields := strings.Split(string(bytes.TrimRight(b, "\x00")), ":")
	if len(fields) < 6+16 {
		return r, fmt.Errorf("%w: %d fields", errRecord, len(fields))
	}
	var v [6]uint64
	for i, bits := range recordBits {
		if v[i], err = strconv.ParseUint(fields[i], 16, bits); err != nil {
			return r, fmt.Errorf("%w: field %d: %w", errRecord, i, err)
		}
	}
	gid, err := hex.DecodeString(strings.Join(fields[6:22], ""))
	if err != nil || len(gid) != 16 {
		return r, fmt.Errorf("%w: GID", errRecord)
	}
	return record{int(v[1]), roce.QPN(v[2]), roce.PSN(v[3]), roce.RKey(v[4]), v[5], netip.AddrFrom16([16]byte(gid)).Unmap()}, nil
}

func (r record) bytes() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%04x:%04x:%06x:%06x:%08x:%016x:", 0, r.outReads, uint32(r.qpn), uint32(r.psn), uint32(r.rkey), r.va)
	for _, g := range r.gid.As16() {
		fmt.Fprintf(&b, "%02x:", g)
	}
	fmt.Fprintf(&b, "%08x:", 0)
	return append(b.Bytes(), make([]byte, recordLen-b.Len())...)
}

// ServePerftest serves perftest clients that exchange keys over TCP until the listener is closed.
func (s *Server) ServePerftest(ctx context.Context, l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := s.perftest(ctx, c); err != nil {
				s.Log.Warn("perftest client", "peer", c.RemoteAddr(), "err", err)
			}
		}()
	}
}

// config returns what queue pairs are made with. perftest's clients have as many requests outstanding as they are told of, so that
// the same number must be in the queue pair and in the record.
func (s *Server) config() roce.QPConfig {
	cfg := s.QP
	if cfg.Resources == 0 {
		cfg.Resources = 16
	}
	return cfg
}

// perftest answers one client. Each message of the client is one write, and waits for an answer of the same length; all
// but the key records can be echoed: versions, page and cache line size, path MTU, bandwidth reports, and "done".
func (s *Server) perftest(ctx context.Context, c net.Conn) error {
	defer context.AfterFunc(ctx, func() { c.Close() })()
	var q io.Closer
	var mine record
	defer func() {
		if q != nil {
			q.Close()
		}
	}()
	cfg := s.config()
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		answer := buf[:n]
		switch {
		case n == 2: // the code of the path MTU
			cfg.PathMTU = 128 << (buf[0] - '0')
		case n == recordLen && q == nil:
			r, err := parseRecord(answer)
			if err != nil {
				return err
			}
			connect := s.connect
			if s.Verbs != nil {
				connect = s.connectVerbs
			}
			if q, mine, err = connect(r, cfg); err != nil {
				return err
			}
			s.Log.Info("perftest client", "peer", r.gid, "qpn", mine.qpn, "rkey", mine.rkey, "mtu", cfg.PathMTU)
			answer = mine.bytes()
		case n == recordLen:
			answer = mine.bytes()
		}
		if _, err := c.Write(answer); err != nil {
			return err
		}
	}
}

// DialPerftest plays the client of the exchange over c and returns a queue pair that is connected to the server's window,
// which is at va under key. cfg.PathMTU must be set.
func DialPerftest(c net.Conn, d *roce.Device, cfg roce.QPConfig) (q *roce.QP, va uint64, key roce.RKey, err error) {
	say := func(b []byte) []byte {
		if err != nil {
			return nil
		}
		if _, err = c.Write(b); err != nil {
			return nil
		}
		answer := make([]byte, len(b))
		_, err = io.ReadFull(c, answer)
		return answer
	}
	version := append([]byte("6.06"), make([]byte, 12)...)
	mtu := byte('0')
	for code, m := range roce.PathMTUs() {
		if m == cfg.PathMTU {
			mtu += code
		}
	}
	for _, m := range [][]byte{version, {0, 0, 16, 0}, {0, 0, 0, 64}, {mtu, 0}} { // version, page size, cache line size, path MTU
		if got := say(m); err == nil && !bytes.Equal(got, m) {
			err = fmt.Errorf("%w: %q is answered by %q", errRecord, m, got)
		}
	}
	if err != nil {
		return nil, 0, 0, err
	}
	if q, err = d.NewQP(d.NewPD(), nil, cfg); err != nil {
		return nil, 0, 0, err
	}
	defer func() {
		if err != nil {
			q.Close()
		}
	}()
	mine := record{max(cfg.Resources, 1), q.QPN(), q.PSN(), 0, 0, d.Link().LocalAddr().Addr()}
	theirs, perr := parseRecord(say(mine.bytes()))
	if err == nil {
		err = perr
	}
	if err == nil {
		err = q.Connect(roce.Remote{Addr: theirs.gid, QPN: theirs.qpn, PSN: theirs.psn})
	}
	return q, theirs.va, theirs.rkey, err
}

// connect makes the queue pair and the window for a client.
func (s *Server) connect(r record, cfg roce.QPConfig) (io.Closer, record, error) {
	pd := s.Device.NewPD()
	mr, err := pd.Register(s.Region, roce.MRConfig{Addr: windowVA, Length: s.Length, Access: s.Access})
	if err != nil {
		return nil, record{}, err
	}
	q, err := s.Device.NewQP(pd, nil, cfg)
	if err != nil {
		return nil, record{}, err
	}
	if err := q.Connect(roce.Remote{Addr: r.gid, QPN: r.qpn, PSN: r.psn}); err != nil {
		q.Close()
		return nil, record{}, err
	}
	local := s.Device.Link().LocalAddr().Addr()
	return q, record{cfg.Resources, q.QPN(), q.PSN(), mr.RKey(), windowVA, local}, nil
}

// connectVerbs is connect with a verbs device of the kernel.
func (s *Server) connectVerbs(r record, cfg roce.QPConfig) (_ io.Closer, _ record, err error) {
	pd, err := s.Verbs.NewPD()
	if err != nil {
		return nil, record{}, err
	}
	all := closers{pd}
	defer func() {
		if err != nil {
			all.Close()
		}
	}()
	mr, err := pd.Register(s.Region.(*roce.Buffer), roce.MRConfig{Addr: windowVA, Length: s.Length, Access: s.Access})
	if err != nil {
		return nil, record{}, err
	}
	all = append(all, closer(mr.Revoke))
	q, err := s.Verbs.NewQP(pd, cfg)
	if err != nil {
		return nil, record{}, err
	}
	all = append(all, q)
	if err := q.Connect(roce.Remote{Addr: r.gid, QPN: r.qpn, PSN: r.psn}); err != nil {
		return nil, record{}, err
	}
	return all, record{cfg.Resources, q.QPN(), q.PSN(), mr.RKey(), mr.Addr(), s.Verbs.Addr()}, nil
}

// closers are closed from the last to the first.
type closers []io.Closer

func (c closers) Close() (err error) {
	for i := len(c) - 1; i >= 0; i-- {
		err = errors.Join(err, c[i].Close())
	}
	return err
}

type closer func() error

func (c closer) Close() error { return c() }

// windowVA is where clients see the region.
const windowVA = 0x7f00_0000_0000

// advert is what rping tells the other side of a buffer: its address, key and length, big endian.
type advert [16]byte

func (a *advert) fields() (va uint64, key roce.RKey, n uint32) {
	return binary.BigEndian.Uint64(a[:]), roce.RKey(binary.BigEndian.Uint32(a[8:])), binary.BigEndian.Uint32(a[12:])
}

func newAdvert(va uint64, key roce.RKey, n uint32) (a advert) {
	binary.BigEndian.PutUint64(a[:], va)
	binary.BigEndian.PutUint32(a[8:], uint32(key))
	binary.BigEndian.PutUint32(a[12:], n)
	return a
}

// maxPing bounds the buffer that an rping client may announce.
const maxPing = 1 << 20

// ServeRping serves rping clients until ctx ends: it READs what the client shows and WRITEs it back.
func (s *Server) ServeRping(ctx context.Context, l *roce.Listener) error {
	for {
		r, err := l.Accept(ctx)
		if err != nil {
			return err
		}
		q, err := r.Accept(s.Device.NewPD(), nil, s.config(), nil)
		if err != nil {
			s.Log.Warn("rping client", "peer", r.Peer(), "err", err)
			continue
		}
		go func() {
			n, err := s.ping(ctx, q)
			s.Log.Info("rping client", "peer", r.Peer(), "rounds", n, "end", err)
			q.Close()
		}()
	}
}

// ping answers one client and returns the number of rounds.
func (s *Server) ping(ctx context.Context, q *roce.QP) (rounds int, err error) {
	// The next message may come as soon as we have answered, so its receive is posted before.
	in := make(chan advert)
	fail := make(chan error, 1)
	go func() {
		for {
			var a advert
			if _, err := q.Recv(ctx, a[:]); err != nil {
				fail <- err
				return
			}
			in <- a
		}
	}()
	next := func() (a advert, err error) {
		select {
		case a = <-in:
		case err = <-fail:
		}
		return a, err
	}
	var data []byte
	for {
		src, err := next()
		if err != nil {
			return rounds, err
		}
		va, key, n := src.fields()
		if n > maxPing {
			return rounds, fmt.Errorf("a buffer of %d bytes", n)
		}
		data = append(data[:0], make([]byte, n)...)
		if err := q.Read(ctx, data, va, key); err != nil {
			return rounds, err
		}
		if err := q.Send(ctx, make([]byte, len(advert{}))); err != nil {
			return rounds, err
		}
		sink, err := next()
		if err != nil {
			return rounds, err
		}
		va, key, n = sink.fields()
		if err := q.Write(ctx, data[:min(int(n), len(data))], va, key); err != nil {
			return rounds, err
		}
		if err := q.Send(ctx, make([]byte, len(advert{}))); err != nil {
			return rounds, err
		}
		rounds++
	}
}

// Rping is an rping client: it shows a buffer to the server, lets it read that, shows another one and compares.
func Rping(ctx context.Context, d *roce.Device, addr netip.Addr, port uint16, rounds int) error {
	pd := d.NewPD()
	const size = 64 // what an rping server has room for unless told otherwise
	src, sink := roce.NewBuffer(size), roce.NewBuffer(size)
	srcMR, err := pd.Register(src, roce.MRConfig{Length: size, Access: roce.AccessRead})
	if err != nil {
		return err
	}
	sinkMR, err := pd.Register(sink, roce.MRConfig{Length: size, Access: roce.AccessWrite})
	if err != nil {
		return err
	}
	q, _, err := d.Dial(ctx, addr, roce.ServiceTCP(port), pd, nil, roce.QPConfig{}, nil)
	if err != nil {
		return err
	}
	defer q.Close()
	for i := range rounds {
		text := append(fmt.Appendf(nil, "backdoor-ping-%d: %060d", i, i)[:size-1], 0) // the server takes it for a string
		src.WriteAt(text, 0)
		for _, a := range []advert{newAdvert(0, srcMR.RKey(), size), newAdvert(0, sinkMR.RKey(), size)} {
			answer := make(chan error, 1)
			go func() {
				_, err := q.Recv(ctx, make([]byte, len(advert{})))
				answer <- err
			}()
			if err := q.Send(ctx, a[:]); err != nil {
				return err
			}
			if err := <-answer; err != nil {
				return err
			}
		}
		got := make([]byte, size)
		sink.ReadAt(got, 0)
		if !bytes.Equal(got, text) {
			return fmt.Errorf("round %d: got %q; want %q", i, got, text)
		}
	}
	return nil
}

// cmRecordLen is the length of perftest's key record over the connection manager: struct pingpong_dest, its numbers big
// endian.
const cmRecordLen = 56

// ServePerftestCM serves perftest clients with -R until ctx ends. Such a client makes two connections to one service: it
// sends the messages of the TCP exchange over the first, and does its test over the second.
func (s *Server) ServePerftestCM(ctx context.Context, l *roce.Listener) error {
	pd := s.Device.NewPD() // shared, for the key is handed out over one connection and used on the other
	mr, err := pd.Register(s.Region, roce.MRConfig{Addr: windowVA, Length: s.Length, Access: s.Access})
	if err != nil {
		return err
	}
	for {
		r, err := l.Accept(ctx)
		if err != nil {
			return err
		}
		q, err := r.Accept(pd, nil, s.config(), nil)
		if err != nil {
			s.Log.Warn("perftest client", "peer", r.Peer(), "err", err)
			continue
		}
		go func() {
			err := s.perftestCM(ctx, q, mr)
			s.Log.Info("perftest client", "peer", r.Peer(), "qpn", q.QPN(), "end", err)
			q.Close()
		}()
	}
}

func (s *Server) perftestCM(ctx context.Context, q *roce.QP, mr *roce.MR) error {
	var mine [cmRecordLen]byte
	be := binary.BigEndian
	be.PutUint32(mine[4:], uint32(s.config().Resources))
	be.PutUint32(mine[8:], uint32(q.QPN()))
	be.PutUint32(mine[16:], uint32(mr.RKey()))
	be.PutUint64(mine[24:], mr.Addr())
	gid := roce.GID(s.Device.Link().LocalAddr().Addr())
	copy(mine[32:], gid[:])
	buf := make([]byte, 4096)
	for {
		c, err := q.Recv(ctx, buf)
		if err != nil {
			return err
		}
		answer := buf[:c.Len]
		if c.Len == cmRecordLen {
			answer = mine[:]
		}
		if err := q.Send(ctx, answer); err != nil {
			return err
		}
	}
}

// Pattern is what word i of verified memory holds.
func Pattern(i uint64) uint64 { return i * 0x9e3779b97f4a7c15 }

// Fill writes the pattern into n bytes, a multiple of eight.
func Fill(w io.WriterAt, n int64) error {
	page := make([]byte, 4096)
	for off := int64(0); off < n; off += int64(len(page)) {
		part := page[:min(int64(len(page)), n-off)]
		for i := 0; i < len(part); i += 8 {
			binary.LittleEndian.PutUint64(part[i:], Pattern(uint64(off+int64(i))/8))
		}
		if _, err := w.WriteAt(part, off); err != nil {
			return err
		}
	}
	return nil
}

// ServeMemory serves the client in testdata/verify.c until ctx ends: the window is told in the private data of the
// connection reply.
func (s *Server) ServeMemory(ctx context.Context, l *roce.Listener) error {
	for {
		r, err := l.Accept(ctx)
		if err != nil {
			return err
		}
		pd := s.Device.NewPD()
		mr, err := pd.Register(s.Region, roce.MRConfig{Addr: windowVA, Length: s.Length, Access: s.Access})
		if err != nil {
			return err
		}
		private := binary.BigEndian.AppendUint64(nil, mr.Addr())
		private = binary.BigEndian.AppendUint64(private, mr.Len())
		private = binary.BigEndian.AppendUint32(private, uint32(mr.RKey()))
		q, err := r.Accept(pd, nil, s.config(), private)
		if err != nil {
			s.Log.Warn("memory client", "peer", r.Peer(), "err", err)
			continue
		}
		go func() {
			<-q.Done()
			s.Log.Info("memory client", "peer", r.Peer(), "qpn", q.QPN(), "end", q.Err())
			q.Close()
			mr.Revoke()
		}()
	}
}

// CheckMemory is a client of ServeMemory: it reads all of the window and compares it with the pattern. It returns the
// window's length in bytes.
func CheckMemory(ctx context.Context, d *roce.Device, addr netip.Addr, port uint16) (uint64, error) {
	q, private, err := d.Dial(ctx, addr, roce.ServiceTCP(port), d.NewPD(), nil, roce.QPConfig{}, nil)
	if err != nil {
		return 0, err
	}
	defer q.Close()
	be := binary.BigEndian
	va, n, key := be.Uint64(private), be.Uint64(private[8:]), roce.RKey(be.Uint32(private[16:]))
	buf := make([]byte, 256<<10)
	for off := uint64(0); off < n; off += uint64(len(buf)) {
		part := buf[:min(uint64(len(buf)), n-off)]
		if err := q.Read(ctx, part, va+off, key); err != nil {
			return off, err
		}
		for i := 0; i+8 <= len(part); i += 8 {
			if got, want := binary.LittleEndian.Uint64(part[i:]), Pattern((off+uint64(i))/8); got != want {
				return off, fmt.Errorf("word %d is %#x; want %#x", (off+uint64(i))/8, got, want)
			}
		}
	}
	return n, nil
}
