// Package control is the language of the control line between the lab and the host's userland: one JSON object a line,
// over the host's second serial port.
//
// The lab sends a Request and gets exactly one Response with the same ID, in any order. The host also sends events, which
// have no ID. Everything here is the lab's own knowledge of the host: the agent under test never sees it.
package control

import (
	"encoding/json"
	"time"
)

// Port is the serial port of the control line as the host's kernel names it.
const Port = "/dev/ttyS1"

// ServicePort is the TCP port of the host's stateful service; see the package comment of hostinit.
const ServicePort = 7007

// SecondKernel and SecondInitrd are where the host has a kernel to start by itself, if it was given one.
const (
	SecondKernel = "/second/vmlinuz"
	SecondInitrd = "/second/initrd"
)

// MaxLine bounds a line in bytes, either way.
const MaxLine = 16 << 20

// Request asks the host for one thing.
type Request struct {
	ID   uint64          `json:"id"`
	Op   string          `json:"op"`
	Args json.RawMessage `json:"args,omitempty"`
}

// Response answers a Request. An event has ID zero and its name in Event.
type Response struct {
	ID     uint64          `json:"id,omitempty"`
	Event  string          `json:"event,omitempty"`
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// The operations.
const (
	OpTime   = "time"   // → Clock
	OpSpawn  = "spawn"  // SpawnArgs → Process
	OpPS     = "ps"     // → []Process
	OpRead   = "read"   // ReadArgs → ReadResult
	OpSymbol = "symbol" // SymbolArgs → Symbols: what /proc/kallsyms says
	OpExec   = "exec"   // ExecArgs → ExecResult
	OpSysrq  = "sysrq"  // SysrqArgs → Fired; the key is pressed at Fired.At
	OpKill   = "kill"   // KillArgs
	OpKexec  = "kexec"  // → Fired: start the kernel in SecondKernel, which takes over at Fired.At
	OpTrace  = "trace"  // TraceArgs: start counting functions
	OpFrames = "frames" // FramesArgs → FramesResult: send raw frames on eth0
	OpTraced = "traced" // → []FunctionCost: stop counting and report
)

// EventExit is sent when a process that was spawned has ended; its Result is an Exit.
const EventExit = "exit"

// Exit tells how a spawned process ended.
type Exit struct {
	PID    int   `json:"pid"`
	Code   int   `json:"code"`   // exit code; -1 if a signal ended it
	Signal int   `json:"signal"` // zero if it ended by itself
	At     Clock `json:"at"`     // when its parent was told
}

// EventReady is sent once the host's userland stands; its Result is a Ready.
const EventReady = "ready"

// Ready describes a host that has just come up.
type Ready struct {
	Boot     string `json:"boot"`    // /proc/sys/kernel/random/boot_id
	Release  string `json:"release"` // uname -r
	Banner   string `json:"banner"`  // /proc/version without its newline
	Hostname string `json:"hostname"`
	CPUs     int    `json:"cpus"`
	Clock    Clock  `json:"clock"`
}

// Clock is the host's idea of time.
type Clock struct {
	Boot time.Duration `json:"boot"` // CLOCK_BOOTTIME
	Wall time.Time     `json:"wall"`
}

// Process is a process as /proc tells.
type Process struct {
	PID     int           `json:"pid"`
	PPID    int           `json:"ppid"`
	Comm    string        `json:"comm"`
	State   string        `json:"state"` // one letter
	UID     uint32        `json:"uid"`   // effective
	CPU     int           `json:"cpu"`   // last ran on
	Threads int           `json:"threads"`
	UTime   time.Duration `json:"utime"`
	STime   time.Duration `json:"stime"`
	Start   time.Duration `json:"start"` // since boot, in steps of 10 ms
	RSS     int64         `json:"rss"`   // bytes
	Kernel  bool          `json:"kernel"`
	Stat    string        `json:"stat"` // the whole line of /proc/PID/stat
}

// SpawnArgs start a process.
type SpawnArgs struct {
	Comm string   `json:"comm"`          // its name, at most 15 bytes
	Argv []string `json:"argv"`          // busybox command line; Argv[0] is the applet
	CPU  int      `json:"cpu"`           // pin it there; negative means anywhere
	PID  int      `json:"pid,omitempty"` // try to get this PID; zero means any
	UID  uint32   `json:"uid,omitempty"`
}

// ReadArgs name files to read, e.g. "/proc/uptime", in one go.
type ReadArgs struct {
	Paths []string `json:"paths"`
}

// ReadResult holds the files in the order asked.
type ReadResult struct {
	Files []File `json:"files"`
}

// File is the content of a file or why it could not be read.
type File struct {
	Path  string `json:"path"`
	Data  string `json:"data"`
	Error string `json:"error,omitempty"`
}

// ExecArgs run a shell command line with busybox and wait for it.
type ExecArgs struct {
	Command string        `json:"command"`
	Timeout time.Duration `json:"timeout,omitempty"` // zero means 30 s
}

// ExecResult is how a command ended.
type ExecResult struct {
	Code   int    `json:"code"` // exit code; 128+n after signal n
	Stdout string `json:"stdout"`
	Stderr string `json:"stderr"`
}

// SysrqArgs press a key of the magic sysrq at a time that the answer tells beforehand.
type SysrqArgs struct {
	Key string `json:"key"`
}

// Fired tells when, by the host's clock, the thing asked for happens.
type Fired struct {
	At Clock `json:"at"`
}

// KillArgs send a signal.
type KillArgs struct {
	PID    int `json:"pid"`
	Signal int `json:"signal"`
}

// FramesArgs are Ethernet frames to send as they are, one after the other and again from the first, until Count were sent or, if For is
// given, that time is over.
type FramesArgs struct {
	Frames [][]byte      `json:"frames"`
	Count  int           `json:"count,omitempty"`
	For    time.Duration `json:"for,omitempty"`
	Gap    time.Duration `json:"gap,omitempty"`  // between two; zero means as fast as it goes
	Vary   int           `json:"vary,omitempty"` // where in each a 16-bit number is raised from frame to frame; zero means nowhere
}

// SymbolArgs name kernel symbols.
type SymbolArgs struct {
	Names []string `json:"names"`
}

// Symbols are the addresses of the kernel symbols that were found.
type Symbols map[string]uint64

// FramesResult says how many went out, and how many the device had no room for.
type FramesResult struct {
	Sent    int `json:"sent"`
	Dropped int `json:"dropped"`
}

// TraceArgs name kernel functions to watch; names that the kernel does not know, or cannot trace, are left out.
type TraceArgs struct {
	Functions []string `json:"functions"`
}

// FunctionCost is how often a kernel function ran, and for how long, as ftrace saw it.
type FunctionCost struct {
	Name  string        `json:"name"`
	Hits  int           `json:"hits"`
	Total time.Duration `json:"total"`
	Known bool          `json:"known"` // the kernel can trace it
}
