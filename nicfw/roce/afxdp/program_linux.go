package afxdp

import (
	"encoding/binary"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// Offsets and values in frames without VLAN tag: Ethernet (14 bytes), IPv4 without options (20) or IPv6 (40), UDP.
const (
	etherTypeOff = 12
	ipOff        = 14
	ipv4UDPOff   = ipOff + 20
	ipv6UDPOff   = ipOff + 40
	udpLen       = 8
	etherIPv4    = 0x0800
	etherIPv6    = 0x86dd
	protocolUDP  = 17
	fragmentBits = 0x3fff // more fragments, and the offset

	xdpPass = 2 // XDP_PASS
)

// program is the XDP program: whole UDP datagrams to port 4791 of addr go to the socket of their queue, if the map has
// one; all else goes the way it would have gone.
func program(addr netip.Addr, sockets *ebpf.Map, frags bool) (*ebpf.Program, error) {
	const ctx, data, end, v, w = asm.R6, asm.R2, asm.R3, asm.R4, asm.R5
	udp, etherType := ipv4UDPOff, int32(etherIPv4)
	if addr.Is6() {
		udp, etherType = ipv6UDPOff, etherIPv6
	}
	// Big-endian fields are compared with constants in the same order.
	swap16 := func(n int32) int32 {
		return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, uint16(n))))
	}
	load := func(off int, size asm.Size) asm.Instruction { return asm.LoadMem(v, data, int16(off), size) }
	ins := asm.Instructions{
		asm.Mov.Reg(ctx, asm.R1),
		asm.LoadMem(data, ctx, 0, asm.Word), // xdp_md.data
		asm.LoadMem(end, ctx, 4, asm.Word),  // xdp_md.data_end
		asm.Mov.Reg(v, data),
		asm.Add.Imm(v, int32(udp+udpLen)),
		asm.JGT.Reg(v, end, "pass"),
		load(etherTypeOff, asm.Half),
		asm.JNE.Imm(v, swap16(etherType), "pass"),
	}
	dst := ipOff + 16
	if addr.Is4() {
		ins = append(ins,
			load(ipOff, asm.Byte), asm.JNE.Imm(v, 0x45, "pass"),
			load(ipOff+6, asm.Half), asm.And.Imm(v, swap16(fragmentBits)), asm.JNE.Imm(v, 0, "pass"),
			load(ipOff+9, asm.Byte), asm.JNE.Imm(v, protocolUDP, "pass"),
		)
	} else {
		dst = ipOff + 24
		ins = append(ins, load(ipOff+6, asm.Byte), asm.JNE.Imm(v, protocolUDP, "pass"))
	}
	for b := addr.AsSlice(); len(b) > 0; b, dst = b[4:], dst+4 {
		ins = append(ins,
			load(dst, asm.Word),
			asm.LoadImm(w, int64(binary.NativeEndian.Uint32(b)), asm.DWord),
			asm.JNE.Reg(v, w, "pass"))
	}
	ins = append(ins,
		load(udp+2, asm.Half), asm.JNE.Imm(v, swap16(roce.Port), "pass"),
		asm.LoadMem(asm.R2, ctx, 16, asm.Word), // xdp_md.rx_queue_index
		asm.LoadMapPtr(asm.R1, sockets.FD()),
		asm.Mov.Imm(asm.R3, xdpPass), // where the map has no socket
		asm.FnRedirectMap.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, xdpPass).WithSymbol("pass"),
		asm.Return(),
	)
	spec := &ebpf.ProgramSpec{Name: "roce", Type: ebpf.XDP, Instructions: ins, License: "Dual MIT/GPL"}
	if frags {
		spec.Flags = unix.BPF_F_XDP_HAS_FRAGS
	}
	return ebpf.NewProgram(spec)
}
