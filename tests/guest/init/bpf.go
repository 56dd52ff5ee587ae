package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bpf is bpf(2), by hand: a library asks for mounts before this program has made them.
func bpf(cmd int, attr []byte) (int, error) {
	n, _, e := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// Instructions of struct bpf_insn, include/uapi/linux/bpf.h: operation, registers, offset, immediate.
var (
	// quiet lets all pass.
	quietProgram = []uint64{0xffffffff_0000_00_b7, 0x95}
	// writer stores eight bytes of its stack, if it is ever run, at the address 0 of whoever runs.
	writerProgram = []uint64{0x00000000_fff8_0a_7a, 0x00000000_0000_01_b7, 0x00000000_0000_a2_bf, 0xfffffff8_0000_02_07, 0x00000008_0000_03_b7,
		36<<32 | 0x85, 0xb7, 0x95} // BPF_FUNC_probe_write_user
)

// loadProgram loads an eBPF program under a name.
func loadProgram(name string, kind uint32, insns []uint64) (int, error) {
	license := []byte("GPL\x00")
	attr := make([]byte, 72)
	le := binary.LittleEndian
	le.PutUint32(attr[0:], kind)
	le.PutUint32(attr[4:], uint32(len(insns)))
	le.PutUint64(attr[8:], uint64(uintptr(unsafe.Pointer(&insns[0]))))
	le.PutUint64(attr[16:], uint64(uintptr(unsafe.Pointer(&license[0]))))
	copy(attr[48:63], name)
	fd, err := bpf(unix.BPF_PROG_LOAD, attr)
	runtime.KeepAlive(insns)
	runtime.KeepAlive(license)
	return fd, err
}

// filtered has a program look at all that it sends to itself, again and again.
func filtered() {
	fd, err := loadProgram("quiet", unix.BPF_PROG_TYPE_SOCKET_FILTER, quietProgram)
	if err != nil {
		os.Exit(1)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil || unix.SetsockoptInt(pair[1], unix.SOL_SOCKET, unix.SO_ATTACH_BPF, fd) != nil {
		os.Exit(1)
	}
	for b := []byte{1}; ; time.Sleep(10 * time.Millisecond) {
		unix.Write(pair[0], b)
		unix.Read(pair[1], b)
	}
}

// writes loads a program that may write into the memory of others.
func writes() {
	if _, err := loadProgram("writer", unix.BPF_PROG_TYPE_RAW_TRACEPOINT, writerProgram); err != nil {
		os.Exit(1)
	}
	for {
		time.Sleep(time.Hour)
	}
}

// programs returns the names of the eBPF programs, as tools find them.
func programs() []string {
	names := []string{}
	le := binary.LittleEndian
	for id := uint32(0); ; {
		attr := make([]byte, 16)
		le.PutUint32(attr, id)
		if _, err := bpf(unix.BPF_PROG_GET_NEXT_ID, attr); err != nil {
			return names
		}
		id = le.Uint32(attr[4:])
		by := make([]byte, 16)
		le.PutUint32(by, id)
		fd, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, by)
		if err != nil {
			continue
		}
		info := make([]byte, 80)
		ask := make([]byte, 16)
		le.PutUint32(ask, uint32(fd))
		le.PutUint32(ask[4:], uint32(len(info)))
		le.PutUint64(ask[8:], uint64(uintptr(unsafe.Pointer(&info[0]))))
		if _, err := bpf(unix.BPF_OBJ_GET_INFO_BY_FD, ask); err == nil {
			name, _, _ := bytes.Cut(info[64:80], []byte{0}) // bpf_prog_info.name
			names = append(names, string(name))
		}
		runtime.KeepAlive(info)
		unix.Close(fd)
	}
}
