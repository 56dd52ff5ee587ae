// Package kernel makes a validated, typed, read-only model of a Linux kernel, running or dead, from its memory alone.
//
// Hosts are x86-64 and AArch64. Open finds the kernel, learns its layout from what it carries about itself (VMCOREINFO,
// kallsyms, BTF) and proves what
// it learned; the Image that it returns is immutable and safe for concurrent use. A View is one budgeted pass over the
// memory: every question of a pass that is asked through the same View reads a page at most once.
//
// Beside tasks, log, heartbeat and panic, a View lists modules, network interfaces and routes, open files, pipes, mounts, sockets,
// slab caches, the use of memory, load, control groups and containers, locks and who waits for them, worker pools, timers,
// interrupts, RCU, block devices with their requests, eBPF, probes, keys and settings; all about a process, its mappings and
// (UserMemory) what they hold; the stacks of threads that sleep, and any object by its type. What those find is gathered as a
// whole, and anew if the host changed it meanwhile.
//
// Nothing is configured, nothing is taken from a list of kernel versions: a layout is what the memory says it is, or the
// kernel is refused with the reason. Whatever comes from the memory may be torn, broken or hostile: every walk has a bound
// and a cycle check, every object is validated, and what breaks an invariant is a *CorruptError, never a panic.
//
// Memory use: an Image keeps the compressed symbol table and the BTF, 7 to 10 MiB for a Debian kernel; Open needs up to
// 25 MiB. A View keeps at most 16 MiB of pages.
package kernel

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// VirtAddr is a kernel virtual address of the host.
type VirtAddr uint64

// String returns the address in hexadecimal with its 0x prefix.
func (a VirtAddr) String() string { return fmt.Sprintf("%#x", uint64(a)) }

var (
	// ErrNotFound means that there is no such thing: no kernel in the memory, no such symbol, type or member.
	ErrNotFound = errors.New("not found")
	// ErrNotYet means that there are signs of a kernel that is still starting: Open may succeed in a moment.
	// It is a kind of ErrNotFound.
	ErrNotYet = fmt.Errorf("%w: kernel is still starting", ErrNotFound)
	// ErrNotSupported means that the kernel lacks, or this package does not know, what is needed.
	ErrNotSupported = errors.New("not supported")
	// ErrTorn means that the host changed an object faster than it could be read consistently: try again.
	ErrTorn = errors.New("changed while it was read")
	// ErrGone means that the memory no longer holds the kernel that the Image was made of: it was rebooted, replaced by
	// kexec, or overwritten. The Image is of no more use; Open again.
	ErrGone = errors.New("kernel is no longer in memory")
	// ErrNotMapped means that the kernel's page tables map nothing at a virtual address.
	ErrNotMapped = errors.New("virtual address is not mapped")
	// ErrAmbiguous means that several symbols or types have the name.
	ErrAmbiguous = errors.New("name is ambiguous")
)

// CorruptError is an object that breaks an invariant of the kernel that it belongs to.
type CorruptError struct {
	Object string
	Addr   VirtAddr
	Why    string
}

func (e *CorruptError) Error() string { return fmt.Sprintf("%s at %v: %s", e.Object, e.Addr, e.Why) }

// Options tune Open. The zero value works.
type Options struct {
	Logger *slog.Logger
	// Hint is what an earlier attach has learned; the zero value means search. If the kernel that it leads to is not seen to
	// be alive, the rest of the memory is searched, too.
	Hint Hint
	// NoteOnly rules out the search: the kernel of Hint.Note is the one, moving or not. For recordings and known images.
	NoteOnly bool
	// Cache, if not nil, keeps what kernels carry about themselves for the next Open.
	Cache *Cache
	// Types, if not nil, is asked for the types of a kernel that carries no BTF or a damaged one: raw BTF that was made of that build
	// elsewhere (pahole, BTFHub, package isf), which Open changes and does not keep; nil, nil if there is none. What it answers is
	// proven as the kernel's own would be.
	Types func(Build) ([]byte, error)
	// Progress is called, if not nil, as the search advances (bytes).
	Progress func(stage string, done, total uint64)
}

// Build names one build of a kernel.
type Build struct {
	Release string // uname -r
	ID      string // the GNU build ID in hexadecimal digits; empty before v5.9
	Banner  string // linux_banner without the end of its line
}

// Rung is one step of the attach ladder and how it ended.
type Rung struct {
	Name     string        `json:"name"`
	OK       bool          `json:"ok"`
	Detail   string        `json:"detail"`
	Duration time.Duration `json:"duration"`
}

// AttachError tells how far Open came before it gave up.
type AttachError struct {
	Rungs []Rung
	Err   error // never nil
}

func (e *AttachError) Error() string { return "attach: " + e.Err.Error() }

// Unwrap returns the reason.
func (e *AttachError) Unwrap() error { return e.Err }

// Info is what is known of an attached kernel.
type Info struct {
	Arch     string           `json:"arch"`    // "x86_64", "aarch64"
	Release  string           `json:"release"` // uname -r
	Banner   string           `json:"banner"`  // linux_banner
	BuildID  string           `json:"buildID"`
	BootID   string           `json:"bootID"`   // differs between boots, even of the same kernel at the same place
	Hostname string           `json:"hostname"` // init_uts_ns at attach
	CPUs     int              `json:"cpus"`
	Note     hostmem.PhysAddr `json:"note"`
	KASLR    uint64           `json:"kaslr"`
	PhysBase int64            `json:"physBase"`
	Levels   int              `json:"pageTableLevels"`
	Symbols  int              `json:"symbols"`
	BTFBytes int              `json:"btfBytes"`
	BootTime time.Time        `json:"bootTime"` // zero if it could not be told
	// Capture says that this is a crash kernel, started by the panic of another, whose memory it is there to save.
	Capture bool   `json:"capture,omitempty"`
	Rungs   []Rung `json:"rungs"`
}

// Task is one thread of the host as its task_struct tells.
type Task struct {
	Addr     VirtAddr      `json:"addr"`
	PID      int           `json:"pid"`  // task_struct.pid: the thread's own
	TGID     int           `json:"tgid"` // the process's
	PPID     int           `json:"ppid"`
	Comm     string        `json:"comm"`
	State    string        `json:"state"` // one letter as in ps(1): R S D T t Z X P I
	UID      uint32        `json:"uid"`   // effective
	Cred     VirtAddr      `json:"cred"`  // real_cred
	CPU      int           `json:"cpu"`
	OnCPU    bool          `json:"onCPU"`
	KThread  bool          `json:"kthread"`
	UTime    time.Duration `json:"utime"`
	STime    time.Duration `json:"stime"`
	Runtime  time.Duration `json:"runtime"` // se.sum_exec_runtime
	Start    time.Duration `json:"start"`   // start_time, monotonic since boot
	RSS      uint64        `json:"rss"`     // bytes
	Switches uint64        `json:"switches"`
	// Execs is self_exec_id, which each execve(2) moves on (the lower 32 bits). MaySetUID says that the task may become root without one: it has
	// CAP_SETUID, or root is among its users.
	Execs     uint32 `json:"execs,omitempty"`
	MaySetUID bool   `json:"maySetUID,omitempty"`
	Confident bool   `json:"confident"` // read twice alike, or the reason for doubt is in the pass's report
}

// CPU is the heartbeat of one CPU, for comparison with an earlier or later sample.
type CPU struct {
	ID        int      `json:"id"`
	Clock     uint64   `json:"clock"` // rq.clock, ns
	Switches  uint64   `json:"switches"`
	Running   uint32   `json:"running"` // rq.nr_running
	Curr      VirtAddr `json:"curr"`
	CurrPID   int      `json:"currPID"`
	CurrComm  string   `json:"currComm"`
	Idle      bool     `json:"idle"`
	TimerIRQs uint64   `json:"timerIRQs"` // x86-64: irq_stat.apic_timer_irqs; aarch64: hrtimer_bases.nr_events; wraps at 2^32
	NMIs      uint64   `json:"nmis"`      // x86-64: irq_stat.__nmi_count; wraps at 2^32; aarch64 has none: 0
	IRQs      uint64   `json:"irqs"`      // kstat.irqs_sum
	Preempt   uint32   `json:"preempt"`   // softirq depth in bits 8-15, hardirq 16-19, NMI 20-23
	NextEvent int64    `json:"nextEvent"` // tick device, ns of CLOCK_MONOTONIC; KTIME_MAX when none
	Online    bool     `json:"online"`
}

// Heartbeat is one sample of the whole host's progress.
type Heartbeat struct {
	At      time.Time `json:"at"` // the reader's clock
	Jiffies uint64    `json:"jiffies"`
	Mono    int64     `json:"mono"` // host CLOCK_MONOTONIC in ns at the timekeeper's last update
	CPUs    []CPU     `json:"cpus"`
}

// PanicState tells whether the kernel has panicked.
type PanicState struct {
	Panicked bool   `json:"panicked"`
	CPU      int    `json:"cpu"` // the CPU that claimed the panic; -1 if none
	Oops     bool   `json:"oops"`
	Tainted  uint64 `json:"tainted"`
	Task     *Task  `json:"task,omitempty"`    // what ran on the panicking CPU
	Message  string `json:"message,omitempty"` // "Kernel panic - not syncing: …" from the ring
}

// LogRecord is one record of the printk ring.
type LogRecord struct {
	Seq      uint64        `json:"seq"`
	Time     time.Duration `json:"time"` // since boot
	Facility uint8         `json:"facility"`
	Level    uint8         `json:"level"`
	Caller   uint32        `json:"caller"`
	Text     string        `json:"text"`
}

// Cost is what a view has cost so far.
type Cost struct {
	Reads int   `json:"reads"` // accesses to the host's memory
	Pages int   `json:"pages"` // of these, whole pages into the cache
	Bytes int64 `json:"bytes"` // read from the host's memory
}

// Field is a member of a kernel structure, anonymous members flattened.
type Field struct {
	Offset    uint64 // bytes
	Size      uint64 // bytes
	BitOffset uint8  // for bit fields, within the byte at Offset
	BitSize   uint8  // zero if not a bit field
}
