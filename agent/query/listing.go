package query

import (
	"context"
	"fmt"
	"io"
	"iter"
	"reflect"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Answer is what a Listing finds: it marshals to JSON, and prints itself for people.
type Answer interface {
	Text(w io.Writer) error
	// Whole tells how far the answer can be trusted.
	Whole() Extent
}

// Extent is how much of the truth an answer is.
type Extent struct {
	At       time.Time `json:"at"`       // the reader's clock
	Complete bool      `json:"complete"` // every walk came to its end
	Doubts   []string  `json:"doubts,omitempty"`
	// Confidence is how sure it is that the parts of the answer belong together, which the host may have changed meanwhile.
	Confidence Confidence `json:"confidence,omitzero"`
}

// Confidence is a level, "high", "fair" or "low", and the evidence for it, as kernel.View gathered it for one answer. Of an answer
// that nothing was read for it is empty.
type Confidence struct {
	Level string `json:"level"`
	kernel.Confidence
}

// confidence is what a view has gathered since it had the evidence before.
func confidence(v View, before kernel.Confidence) Confidence {
	c := v.Confidence().Since(before)
	if c == (kernel.Confidence{}) {
		return Confidence{}
	}
	return Confidence{c.Level(), c}
}

// Whole returns the extent itself.
func (e Extent) Whole() Extent { return e }

func (e *Extent) believe(c Confidence) { e.Confidence = c }

// Listing is a question about one of the kernel's subsystems.
type Listing struct {
	Name     string // what people call it: the verb of the command line
	Resource string // what Redfish calls it
	Args     string // of the usage line; without brackets, an argument is needed
	Short    string
	Long     string
	// Secret says that the answer holds memory that may be anything, that of programs among it: whoever asks must say that he means to.
	Secret bool
	// Served says that agents answer it over Redfish, without arguments: for the whole host.
	Served bool
	Ask    func(ctx context.Context, v *kernel.View, args []string) (Answer, error)
	// Empty returns a pointer to an answer to decode JSON into.
	Empty func() Answer
}

// Listings are all of them.
func Listings() []Listing {
	return []Listing{
		listing(Listing{Served: true, Name: "lsmod", Resource: "Modules", Short: "the host's kernel modules",
			Long: `The modules of all three ways by which the kernel knows them: the list that lsmod shows there, /sys/module, and the tree of
their addresses. A live module that is not in all three is marked HIDDEN, and the exit status is 3.

  backdoor -image vmcore lsmod
  backdoor -mem /dev/shm/vm.ram lsmod -json | jq '.modules[] | select(.missing)'`}, AskModules),
		listing(Listing{Name: "modinfo", Resource: "Module", Args: "NAME", Short: "one of the host's kernel modules, with its sections and parameters",
			Long: `The values of the parameters are those of now.

  backdoor -image vmcore modinfo virtio_net`}, AskModule),
		listing(Listing{Served: true, Name: "ip", Resource: "Interfaces", Short: "the host's network interfaces",
			Long: `Interfaces of all network namespaces, with their addresses; those of containers are marked by the number of their namespace.
Counters that only the driver knows are shown as "-".

  backdoor -image vmcore ip`}, AskInterfaces),
		listing(Listing{Name: "pstree", Resource: "ProcessTree", Args: "[PID]", Short: "the host's processes as a tree",
			Long: `With a PID, the processes below that one.

  backdoor -image vmcore pstree 1`}, AskTree),
		listing(Listing{Served: true, Name: "lsof", Resource: "OpenFiles", Args: "[PID]", Short: "the files that processes have open",
			Long: `Working directories, roots, programs and descriptors, with their paths as /proc/PID/fd shows them there; mode r, w or u (both)
stands behind the descriptor.

  backdoor -image vmcore lsof 1
  backdoor -image vmcore lsof -json | jq '.files[] | select(.path | endswith("(deleted)"))'`}, AskOpenFiles),
		listing(Listing{Served: true, Name: "mount", Resource: "Mounts", Args: "[PID]", Short: "the host's mounts",
			Long: `Mounts of the host's own namespace, or of the one that the process PID is in. Options that a file system keeps to itself are not
shown.

  backdoor -image vmcore mount`}, AskMounts),
		listing(Listing{Served: true, Name: "ss", Resource: "Sockets", Short: "the host's sockets, and whose they are",
			Long: `TCP, UDP and unix sockets of all network namespaces, and those of other families that a process has open. RECV-Q and SEND-Q are
bytes that wait; of a listening socket, connections that wait to be accepted and how many may.

  backdoor -image vmcore ss
  backdoor -image vmcore ss -json | jq '.sockets[] | select(.state == "LISTEN")'`}, AskSockets),
		listing(Listing{Served: true, Name: "slabtop", Resource: "SlabCaches", Short: "what the host's kernel uses its own memory for",
			Long: `The slab caches, the largest first.

  backdoor -image vmcore slabtop`}, AskSlabCaches),
		listing(Listing{Served: true, Name: "vmstat", Resource: "Memory", Short: "what the host's memory is used for",
			Long: `The use of memory, the zones with their watermarks, the pressure (PSI), and counters that tell of trouble; -json has all of
/proc/vmstat's.

  backdoor -image vmcore vmstat
  backdoor -image vmcore vmstat -json | jq '.counters[] | select(.name == "oom_kill")'`}, AskMemory),
		listing(Listing{Served: true, Name: "edac", Resource: "MemoryErrors", Short: "the errors that the host's memory controllers have counted",
			Long: `What the kernel's EDAC drivers count of each memory controller and module, as rasdaemon and edac-util see it there. Most virtual
machines have no such driver. The exit status is 3 if an error could not be corrected.

  backdoor -image vmcore edac
  backdoor -image vmcore edac -json | jq '.controllers[].modules[] | select(.correctable > 0)'`}, AskMemoryErrors),
		listing(Listing{Served: true, Name: "lspci", Resource: "PCI", Short: "what is on the host's PCI buses",
			Long: `The functions of PCI devices as the host's kernel has found them, and the driver of each.

  backdoor -image vmcore lspci
  backdoor -image vmcore lspci -json | jq '.devices[] | select(.driver == null)'`}, AskPCI),
		listing(Listing{Served: true, Name: "protections", Resource: "Protections", Short: "what the host's kernel protects itself with",
			Long: `Lockdown, AppArmor, SELinux, Yama, randomised addresses and the like, as far as the kernel has them, and how strong they stand.

  backdoor -image vmcore protections
  backdoor -image vmcore protections -json | jq '.guards[] | select(.level == 0)'`}, AskProtections),
		listing(Listing{Served: true, Name: "load", Resource: "Load", Short: "the host's load averages and run queues",
			Long: `  backdoor -image vmcore load`}, AskLoad),
		listing(Listing{Served: true, Name: "cgroups", Resource: "ControlGroups", Short: "the host's control groups: limits and use",
			Long: `The tree of cgroup v2 with what the memory, pids and cpu controllers limit and count; QUOTA is in CPUs. "-" is where a controller is
not enabled.

  backdoor -image vmcore cgroups
  backdoor -image vmcore cgroups -json | jq '.cgroups[] | select(.memory.oomKills > 0)'`}, AskCgroups),
		listing(Listing{Served: true, Name: "containers", Resource: "Containers", Args: "[ID]", Short: "the host's containers and what runs in them",
			Long: `Containers are known by the names of their control groups: Docker's, containerd's, CRI-O's, Podman's, LXC's, systemd's machines. Of a
single one, its tasks are shown, with the PIDs that they have inside.

  backdoor -image vmcore containers
  backdoor -image vmcore containers 4f1c`}, AskContainers),
		listing(Listing{Served: true, Name: "locks", Resource: "Locks", Short: "who waits for whose locks, and deadlocks among them",
			Long: `Mutexes, reader-writer semaphores and the like that tasks sleep on, with who holds them, and the kernel's big locks that are held.
The exit status is 3 if tasks wait for each other.

  backdoor -image vmcore locks`}, AskLocks),
		listing(Listing{Served: true, Name: "workqueues", Resource: "WorkerPools", Short: "what the kernel's workers do, and what waits for them",
			Long: `The pools of kworkers, the work that each is at, and the work that waits. STUCK FOR is how long none of what waits was begun.

  backdoor -image vmcore workqueues`}, AskWorkerPools),
		listing(Listing{Served: true, Name: "disks", Resource: "Disks", Short: "the host's block devices and the requests under way",
			Long: `  backdoor -image vmcore disks
  backdoor -image vmcore disks -json | jq '.disks[].inFlight[] | select(.age > 1e10)'`}, AskDisks),
		listing(Listing{Served: true, Name: "bpf", Resource: "BPF", Short: "the eBPF programs, maps and links of the host",
			Long: `  backdoor -image vmcore bpf`}, AskBPF),
		listing(Listing{Served: true, Name: "probes", Resource: "Probes", Short: "what is hooked into the kernel's code: kprobes, ftrace, tracepoints, live patches",
			Long: `  backdoor -image vmcore probes`}, AskProbes),
		listing(Listing{Name: "uprobes", Resource: "Uprobes", Short: "what is hooked into the code of the host's programs",
			Long: `The path is that within the file system that the program is in.

  backdoor -image vmcore uprobes`}, AskUprobes),
		listing(Listing{Name: "lsm", Resource: "SecurityHooks", Short: "what the host's security modules have called at the kernel's hooks",
			Long: `  backdoor -image vmcore lsm
  backdoor -image vmcore lsm -json | jq '.probes[] | select(.function | contains("["))'`}, AskLSM),
		listing(Listing{Served: true, Name: "about", Resource: "KernelState", Short: "the kernel's command line, taint, clock, security modules and swap",
			Long: `  backdoor -image vmcore about`}, AskHost),
		listing(Listing{Served: true, Name: "pstore", Resource: "PersistentStore", Short: "what earlier kernels left of their logs when they died",
			Long: `The files of /sys/fs/pstore if that is mounted there, of any backend; else what is in the memory of ramoops. "dmesg -previous" leaves
out what this boot has written itself.

  backdoor -image vmcore pstore
  backdoor -image vmcore pstore -json | jq -r '.records[] | select(.reason == "Panic").text'`}, AskPstore),
		listing(Listing{Served: true, Name: "rcu", Resource: "RCU", Short: "whether RCU gets on, and which CPUs it waits for",
			Long: `  backdoor -image vmcore rcu`}, AskRCU),
		listing(Listing{Name: "timers", Resource: "Timers", Short: "what the kernel's timers will do next",
			Long: `DUE is in seconds from now on. FOR is the work that a timer queues, or the thread that it wakes.

  backdoor -image vmcore timers`}, AskTimers),
		listing(Listing{Name: "irqs", Resource: "Interrupts", Short: "interrupts and softirqs of each CPU",
			Long: `Those that have happened; -json has all. MCE and MCP are machine-check exceptions and polls.

  backdoor -image vmcore irqs`}, AskInterrupts),
		listing(Listing{Name: "pipes", Resource: "Pipes", Short: "the pipes that processes have open, and what waits in them",
			Long: `  backdoor -image vmcore pipes`}, AskPipes),
		listing(Listing{Name: "routes", Resource: "Routes", Short: "the host's IPv4 routes",
			Long: `Of all network namespaces and tables.

  backdoor -image vmcore routes`}, AskRoutes),
		listing(Listing{Name: "routes6", Resource: "Routes6", Short: "the host's IPv6 routes",
			Long: `Of all network namespaces and tables.

  backdoor -image vmcore routes6`}, AskRoutes6),
		listing(Listing{Name: "sysctl", Resource: "Settings", Args: "[NAME]", Short: "the kernel's settings",
			Long: `With a NAME, that setting and those below it. What a handler of its own may show otherwise there has a "?".

  backdoor -image vmcore sysctl kernel.panic
  backdoor -image vmcore sysctl net.ipv4`}, AskSysctls),
		listing(Listing{Name: "keys", Resource: "Keys", Short: "the names of the keys that the kernel keeps",
			Long: `What the keys hold is not read.

  backdoor -image vmcore keys`}, AskKeys),
		listing(Listing{Name: "proc", Resource: "Process", Args: "PID", Short: "all about one thread: credentials, namespaces, scheduling, memory",
			Long: `  backdoor -image vmcore proc 1`}, AskProcess),
		listing(Listing{Name: "maps", Resource: "Mappings", Args: "PID", Short: "what is mapped into a process, and how much of it is in memory",
			Long: `  backdoor -image vmcore maps 1`}, AskMappings),
		listing(Listing{Secret: true, Name: "environ", Resource: "Environment", Args: "PID", Short: "the arguments and the environment of a process",
			Long: `They are memory of the process, and may hold passwords: -secrets must be said.

  backdoor -image vmcore environ 1 -secrets`}, AskEnvironment),
		listing(Listing{Secret: true, Name: "mem", Resource: "UserMemory", Args: "PID ADDR BYTES", Short: "memory of a process",
			Long: `It is read through the page tables of the process; what is swapped out, or was never touched, is said. -secrets must be said.

  backdoor -image vmcore mem 1 0x7ffd1234a000 256 -secrets`}, AskUserMemory),
		listing(Listing{Name: "stack", Resource: "Stack", Args: "PID", Short: "where in the kernel a thread sleeps",
			Long: `The frames are unwound by the tables (ORC) that the kernel carries for that. A thread that runs has its registers in its CPU,
and cannot be told. If the unwinding comes to a halt, what looks like a return address behind is shown with a "?".

  backdoor -image vmcore stack 1`}, AskStack),
		listing(Listing{Name: "sym", Resource: "Symbol", Args: "NAME|ADDR", Short: "the address of a symbol of the kernel, or what is at an address",
			Long: `  backdoor -image vmcore sym init_task
  backdoor -image vmcore sym 0xffffffff81000123`}, AskSymbol),
		listing(Listing{Secret: true, Name: "x", Resource: "Examined", Args: "FORMAT NAME|ADDR", Short: "the kernel's memory as it is, as x of gdb and crash shows it: x/8xg ADDR",
			Long: `FORMAT is a count, a format (x, d, u, o, t, c, a for addresses with their symbols, s for text) and a size (b, h, w, g: 1 to 8 bytes); it may
stand behind a slash. All memory of all programs can be seen so: -secrets must be said.

  backdoor -image vmcore x/16xg init_task -secrets
  backdoor -image vmcore x/s linux_banner -secrets
  backdoor -image vmcore x 4a 0xffffffff82400000 -secrets`}, Examine),
		listing(Listing{Secret: true, Name: "print", Resource: "Object", Args: "TYPE NAME|ADDR", Short: "an object of the kernel, by its type",
			Long: `TYPE is any that the kernel's BTF knows. The number before each member is its offset. As with x, all memory of all programs can be
seen so: -secrets must be said.

  backdoor -image vmcore print task_struct init_task -secrets
  backdoor -image vmcore print list_head 0xffff888003a41d40 -secrets`}, AskObject),
	}
}

// listing ties a question to the type of its answer.
func listing[A Answer, P interface {
	*A
	believe(Confidence)
}](l Listing, ask func(context.Context, *kernel.View, []string) (A, error)) Listing {
	l.Ask = func(ctx context.Context, v *kernel.View, args []string) (Answer, error) {
		before := v.Confidence()
		a, err := ask(ctx, v, args)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.Name, err)
		}
		P(&a).believe(confidence(v, before))
		return a, nil
	}
	l.Empty = func() Answer { return reflect.New(reflect.TypeFor[A]()).Interface().(Answer) }
	return l
}

// ArgumentError is an argument that is not what it is to be.
type ArgumentError struct{ Got, Want string }

func (e *ArgumentError) Error() string { return fmt.Sprintf("%q is not %s", e.Got, e.Want) }

// gather collects a sequence. What breaks off makes the extent incomplete; it is an error if nothing came before.
func gather[T any](ctx context.Context, e *Extent, seq iter.Seq2[T, error]) ([]T, error) {
	if e.At.IsZero() {
		e.At, e.Complete = time.Now(), true
	}
	all := []T{}
	for x, err := range seq {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			if len(all) == 0 {
				return nil, err
			}
			e.doubt(err)
			break
		}
		all = append(all, x)
	}
	return all, nil
}

// doubt notes why an answer is not the whole truth.
func (e *Extent) doubt(err error) {
	e.Complete = false
	if len(e.Doubts) < maxDoubts {
		e.Doubts = append(e.Doubts, err.Error())
	}
}
