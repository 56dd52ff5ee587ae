package uverbs

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// Device is an open verbs device. It is safe for concurrent use.
type Device struct {
	name  string
	addr  netip.Addr
	port  uint8
	gid   uint8 // index of the one for addr
	async int   // file of events, never read

	mu   sync.Mutex
	fd   int      // -1 when closed; guarded by mu
	req  []byte   // guarded by mu
	resp [64]byte // guarded by mu
	cq   uint32   // that nothing ever completes on; guarded by mu
}

// Commands (enum ib_uverbs_write_cmds).
const (
	cmdGetContext = 0
	cmdAllocPD    = 3
	cmdDeallocPD  = 4
	cmdRegMR      = 9
	cmdDeregMR    = 13
	cmdCreateCQ   = 18
	cmdCreateQP   = 24
	cmdModifyQP   = 26
	cmdDestroyQP  = 27
)

// sysfs is where the kernel lists verbs devices.
const sysfs = "/sys/class/infiniband_verbs"

// ErrNoDevice means that no verbs device speaks RoCEv2 from the address.
var ErrNoDevice = errors.New("no verbs device has the address for RoCEv2")

// Open opens the verbs device that speaks RoCEv2 from an address of this machine. The error wraps ErrNoDevice if there is
// none.
func Open(addr netip.Addr) (*Device, error) {
	d, err := open(addr.Unmap().WithZone(""))
	if err != nil {
		return nil, fmt.Errorf("open verbs device for %v: %w", addr, err)
	}
	return d, nil
}

func open(addr netip.Addr) (_ *Device, err error) {
	d := &Device{addr: addr, fd: -1, async: -1}
	node, err := d.find(sysfs)
	if err != nil {
		return nil, err
	}
	if d.fd, err = unix.Open(filepath.Join("/dev/infiniband", node), unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("%s (%s): %w", node, d.name, err)
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	d.mu.Lock()
	defer d.mu.Unlock()
	out, err := d.command("get context", cmdGetContext, 8, nil) // struct ib_uverbs_get_context
	if err != nil {
		return nil, err
	}
	d.async = int(out.u32(0))
	unix.CloseOnExec(d.async)
	// struct ib_uverbs_create_cq: user_handle, cqe, comp_vector, comp_channel, reserved
	out, err = d.command("create completion queue", cmdCreateCQ, 8, new(fields).u64(0).u32(1).u32(0).u32(1<<32-1).u32(0))
	if err != nil {
		return nil, fmt.Errorf("%w (a driver that needs more than the common interface is not supported)", err)
	}
	d.cq = out.u32(0)
	return d, nil
}

// find looks for the device and its GID. It returns the name of the device node.
func (d *Device) find(root string) (node string, err error) {
	nodes, err := filepath.Glob(filepath.Join(root, "uverbs*"))
	if err != nil {
		return "", err
	}
	for _, n := range nodes {
		name, err := os.ReadFile(filepath.Join(n, "ibdev"))
		if err != nil {
			continue
		}
		gids, _ := filepath.Glob(filepath.Join(n, "device/infiniband", strings.TrimSpace(string(name)), "ports/*/gids/*"))
		if len(gids) == 0 { // a device without a parent (rxe)
			gids, _ = filepath.Glob(filepath.Join(root, "../infiniband", strings.TrimSpace(string(name)), "ports/*/gids/*"))
		}
		for _, g := range gids {
			port, errPort := strconv.ParseUint(filepath.Base(filepath.Dir(filepath.Dir(g))), 10, 8)
			index, errIndex := strconv.ParseUint(filepath.Base(g), 10, 8)
			text, errText := os.ReadFile(g)
			kind, errKind := os.ReadFile(filepath.Join(g, "../../gid_attrs/types", filepath.Base(g))) // fails for one that is not in use
			if errors.Join(errPort, errIndex, errText, errKind) != nil || strings.TrimSpace(string(kind)) != "RoCE v2" {
				continue
			}
			if a, err := netip.ParseAddr(strings.TrimSpace(string(text))); err == nil && a.Unmap() == d.addr {
				d.name, d.port, d.gid = strings.TrimSpace(string(name)), uint8(port), uint8(index)
				return filepath.Base(n), nil
			}
		}
	}
	return "", ErrNoDevice
}

// Name returns the device's name, as rdma(8) shows it.
func (d *Device) Name() string { return d.name }

// Addr returns the address that peers reach the device by.
func (d *Device) Addr() netip.Addr { return d.addr }

// Close ends all queue pairs and regions of the device.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return nil
	}
	var err error
	if d.async >= 0 {
		err = unix.Close(d.async)
	}
	err = errors.Join(err, unix.Close(d.fd))
	d.fd, d.async = -1, -1
	return err
}

// fields builds the body of a command, in the machine's byte order.
type fields struct{ b []byte }

func (f *fields) u64(v uint64) *fields { f.b = binary.NativeEndian.AppendUint64(f.b, v); return f }
func (f *fields) u32(v uint32) *fields { f.b = binary.NativeEndian.AppendUint32(f.b, v); return f }
func (f *fields) u16(v uint16) *fields { f.b = binary.NativeEndian.AppendUint16(f.b, v); return f }
func (f *fields) u8(v ...uint8) *fields {
	f.b = append(f.b, v...)
	return f
}

// answer is the response to a command.
type answer []byte

func (a answer) u32(at int) uint32 { return binary.NativeEndian.Uint32(a[at:]) }

// command runs one command: a header of command number and lengths in words, the address of the response unless it has
// none (size 0), and the fields. There is always room behind the common response for that of the driver. Called with mu
// held.
func (d *Device) command(what string, number uint32, size int, f *fields) (answer, error) {
	if d.fd < 0 {
		return nil, fmt.Errorf("%s: %w", what, os.ErrClosed)
	}
	room := 0
	if size > 0 {
		room = len(d.resp)
	}
	h := new(fields).u32(number).u16(0).u16(uint16(room / 4))
	if room > 0 {
		h.u64(uint64(uintptr(unsafe.Pointer(&d.resp[0])))) // d is in the heap, whose objects do not move
	}
	d.req = append(d.req[:0], h.b...)
	if f != nil {
		d.req = append(d.req, f.b...)
	}
	binary.NativeEndian.PutUint16(d.req[4:], uint16(len(d.req)/4))
	clear(d.resp[:])
	for {
		n, err := unix.Write(d.fd, d.req)
		runtime.KeepAlive(d)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, fmt.Errorf("%s: %w", what, err)
		case n != len(d.req):
			return nil, fmt.Errorf("%s: the kernel took %d of %d bytes", what, n, len(d.req))
		}
		return d.resp[:], nil
	}
}

// PD is a protection domain: keys of its regions work on its queue pairs and on no others.
type PD struct {
	d      *Device
	handle uint32
}

// NewPD makes a protection domain.
func (d *Device) NewPD() (*PD, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	out, err := d.command("allocate protection domain", cmdAllocPD, 4, nil)
	if err != nil {
		return nil, err
	}
	return &PD{d, out.u32(0)}, nil
}

// Close gives the domain back. It fails while it has regions or queue pairs.
func (p *PD) Close() error {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	_, err := p.d.command("free protection domain", cmdDeallocPD, 0, new(fields).u32(p.handle))
	return err
}

// MR is memory that peers reach.
type MR struct {
	d      *Device
	mem    *roce.Buffer // kept while the device has it
	addr   uint64
	length uint64
	handle uint32
	key    roce.RKey
	timer  *time.Timer
	once   sync.Once
	err    error
}

// Rights (enum ib_uverbs_access_flags).
const (
	accessLocalWrite   = 1
	accessRemoteWrite  = 2
	accessRemoteRead   = 4
	accessRemoteAtomic = 8
)

func accessFlags(a roce.Access) (flags uint32) {
	if a&roce.AccessRead != 0 {
		flags |= accessRemoteRead
	}
	if a&roce.AccessWrite != 0 {
		flags |= accessLocalWrite | accessRemoteWrite
	}
	if a&roce.AccessAtomic != 0 {
		flags |= accessLocalWrite | accessRemoteAtomic
	}
	return flags
}

// pageMask is the part of an address that must be the same on both sides.
const pageMask = 4095

// Register opens a window of b to the peers of the domain's queue pairs. The address under which they see it is cfg.Addr, if
// that lies in its page as the memory does, or one near it: see Addr.
func (p *PD) Register(b *roce.Buffer, cfg roce.MRConfig) (*MR, error) {
	mem := b.Bytes()
	if cfg.Length == 0 || cfg.Offset < 0 || uint64(cfg.Offset) > uint64(len(mem)) || cfg.Length > uint64(len(mem))-uint64(cfg.Offset) {
		return nil, fmt.Errorf("register memory: %#x bytes at offset %#x of %#x", cfg.Length, cfg.Offset, len(mem))
	}
	start := uint64(uintptr(unsafe.Pointer(&mem[cfg.Offset])))
	m := &MR{d: p.d, mem: b, addr: cfg.Addr&^pageMask | start&pageMask, length: cfg.Length}
	if m.addr+m.length < m.addr {
		return nil, fmt.Errorf("register memory: %#x bytes at %#x are no address range", cfg.Length, cfg.Addr)
	}
	d := p.d
	d.mu.Lock()
	defer d.mu.Unlock()
	// struct ib_uverbs_reg_mr: start, length, hca_va, pd_handle, access_flags
	out, err := d.command("register memory", cmdRegMR, 12, new(fields).u64(start).u64(m.length).u64(m.addr).u32(p.handle).u32(accessFlags(cfg.Access)))
	if err != nil {
		return nil, err
	}
	m.handle, m.key = out.u32(0), roce.RKey(out.u32(8))
	if cfg.Lifetime > 0 {
		m.timer = time.AfterFunc(cfg.Lifetime, func() { m.Revoke() })
	}
	return m, nil
}

// RKey returns the key that peers name the region by.
func (m *MR) RKey() roce.RKey { return m.key }

// Addr returns the address under which peers see the first byte.
func (m *MR) Addr() uint64 { return m.addr }

// Len returns the length in bytes.
func (m *MR) Len() uint64 { return m.length }

// Revoke closes the window. When it returns without an error, no request is served through it any more.
func (m *MR) Revoke() error {
	m.once.Do(func() {
		if m.timer != nil {
			m.timer.Stop()
		}
		m.d.mu.Lock()
		defer m.d.mu.Unlock()
		if m.d.fd >= 0 {
			_, m.err = m.d.command("deregister memory", cmdDeregMR, 0, new(fields).u32(m.handle))
		}
	})
	return m.err
}

// QP is the passive end of a reliable connection.
type QP struct {
	d      *Device
	handle uint32
	num    roce.QPN
	psn    roce.PSN
	cfg    roce.QPConfig
}

const typeRC = 2 // IB_UVERBS_QPT_RC

// States (enum ib_qp_state) and the attributes that come with them (enum ib_qp_attr_mask).
const (
	stateInit = 1
	stateRTR  = 2

	attrState         = 1 << 0
	attrAccess        = 1 << 3
	attrPKey          = 1 << 4
	attrPort          = 1 << 5
	attrAV            = 1 << 7
	attrPathMTU       = 1 << 8
	attrRQPSN         = 1 << 12
	attrMinRNRTimer   = 1 << 15
	attrMaxDestAtomic = 1 << 17
	attrDestQPN       = 1 << 20
)

// NewQP makes a queue pair. Of cfg, PathMTU (default 1024) and Resources (default 4) count.
func (d *Device) NewQP(pd *PD, cfg roce.QPConfig) (*QP, error) {
	if cfg.PathMTU == 0 {
		cfg.PathMTU = 1024
	}
	if cfg.Resources <= 0 {
		cfg.Resources = 4
	}
	if pathMTU(cfg.PathMTU) == 0 || cfg.Resources > 255 {
		return nil, fmt.Errorf("create queue pair: path MTU %d, %d resources", cfg.PathMTU, cfg.Resources)
	}
	var psn [4]byte
	rand.Read(psn[:]) // never fails
	q := &QP{d: d, cfg: cfg, psn: roce.PSN(binary.NativeEndian.Uint32(psn[:]) & 0xffffff)}
	d.mu.Lock()
	defer d.mu.Unlock()
	// struct ib_uverbs_create_qp: user_handle; pd, send_cq, recv_cq, srq; max_send_wr, max_recv_wr, max_send_sge,
	// max_recv_sge, max_inline_data; sq_sig_all, qp_type, is_srq, reserved
	out, err := d.command("create queue pair", cmdCreateQP, 32, new(fields).u64(0).u32(pd.handle).u32(d.cq).u32(d.cq).u32(0).
		u32(1).u32(1).u32(1).u32(1).u32(0).u8(0, typeRC, 0, 0))
	if err != nil {
		return nil, err
	}
	q.handle, q.num = out.u32(0), roce.QPN(out.u32(4))
	err = q.modify("initialise queue pair", stateInit, attrAccess|attrPKey|attrPort, roce.Remote{})
	if err != nil {
		q.destroy()
		return nil, err
	}
	return q, nil
}

// pathMTU returns the code of a path MTU, or 0.
func pathMTU(n int) uint8 {
	for code, mtu := range roce.PathMTUs() {
		if mtu == n {
			return code
		}
	}
	return 0
}

// modify changes the queue pair's state. Called with the device's mu held.
func (q *QP) modify(what string, state uint8, mask uint32, r roce.Remote) error {
	gid := roce.GID(r.Addr)
	f := new(fields)
	// struct ib_uverbs_qp_dest: dgid; flow_label; dlid, reserved; sgid_index, hop_limit, traffic_class, sl, src_path_bits,
	// static_rate, is_global, port_num
	f.u8(gid[:]...).u32(0).u16(0).u16(0).u8(q.d.gid, 64, 0, 0, 0, 0, 1, q.d.port)
	f.u8(make([]byte, 32)...) // no alternate path
	// struct ib_uverbs_modify_qp
	f.u32(q.handle).u32(attrState | mask).u32(0).u32(uint32(r.PSN)).u32(uint32(q.psn)).u32(uint32(r.QPN))
	f.u32(accessRemoteRead | accessRemoteWrite | accessRemoteAtomic) // what regions allow is another matter
	f.u16(0).u16(0)                                                  // pkey_index, alt_pkey_index
	f.u8(state, 0, pathMTU(q.cfg.PathMTU), 0, 0)                     // …, cur_qp_state, path_mtu, path_mig_state, en_sqd_async_notify
	f.u8(0, uint8(q.cfg.Resources), 12, q.d.port)                    // max_rd_atomic, max_dest_rd_atomic, min_rnr_timer (0.64 ms), port_num
	f.u8(0, 0, 0, 0, 0, 0, 0)                                        // timeout, retry_cnt, rnr_retry, alternates, reserved
	_, err := q.d.command(what, cmdModifyQP, 0, f)
	return err
}

// QPN returns the number by which the peer addresses the queue pair.
func (q *QP) QPN() roce.QPN { return q.num }

// PSN returns the number of the first packet that the queue pair would send; it sends none of its own.
func (q *QP) PSN() roce.PSN { return q.psn }

// PathMTU returns the payload bytes of a full packet, which must be the same on both ends.
func (q *QP) PathMTU() int { return q.cfg.PathMTU }

// Connect joins the queue pair with its peer, whom it serves from then on.
func (q *QP) Connect(r roce.Remote) error {
	r.Addr = r.Addr.Unmap().WithZone("")
	if !r.Addr.IsValid() || r.Addr.Is4() != q.d.addr.Is4() {
		return fmt.Errorf("connect queue pair %v: no way from %v to %v", q.num, q.d.addr, r.Addr)
	}
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	return q.modify("connect queue pair", stateRTR, attrAV|attrPathMTU|attrDestQPN|attrRQPSN|attrMaxDestAtomic|attrMinRNRTimer, r)
}

// Close ends the queue pair.
func (q *QP) Close() error {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	if q.handle == ^uint32(0) || q.d.fd < 0 {
		return nil
	}
	return q.destroy()
}

// destroy gives the queue pair back. Called with the device's mu held.
func (q *QP) destroy() error {
	h := q.handle
	q.handle = ^uint32(0)
	_, err := q.d.command("destroy queue pair", cmdDestroyQP, 4, new(fields).u32(h).u32(0)) // struct ib_uverbs_destroy_qp
	return err
}
