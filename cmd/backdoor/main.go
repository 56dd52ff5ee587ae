// Backdoor is the operator's command: it asks an agent about the host that it watches, and has the host healed.
//
// # Synopsis
//
//	backdoor [flags] VERB [arguments]
//
// # Description
//
// The host is chosen by -host URL or by a context of the configuration file; without either, the current context is used.
// With -image FILE (a crash dump: ELF vmcore, LiME or raw) or -mem FILE (the live RAM file of a virtual machine) there is no
// agent: the verbs from status to print then work on that memory by themselves, findings aside. Agents answer those that need no
// argument. Flags may stand before or after the verb.
// With -rdma HOST the same verbs work on the memory behind an agent, here, by RDMA over a plain UDP socket (port 4791, which must be
// free at our address), and findings, heal, undo, power and journal are asked over its action queue pair: no RDMA device is needed. The
// leases come from the agent's Redfish service (-host or the context), or, where that no longer answers, from a key (-rdma-key).
// Every verb prints tables for people, or JSON with -json.
//
// The verbs:
//
//	status       how the host and its agent stand
//	attach       how the host's kernel was found and proven
//	findings     what is wrong with the host; findings ID tells everything about one
//	ps           the host's processes
//	top          the host's busiest processes
//	dmesg        the host's kernel log; -w follows it
//	lsmod        the host's kernel modules, those that hide among them
//	modinfo      one of the host's kernel modules, with its sections and parameters
//	ip           the host's network interfaces
//	pstree       the host's processes as a tree
//	lsof         the files that processes have open
//	mount        the host's mounts
//	ss           the host's sockets, and whose they are
//	slabtop      what the host's kernel uses its own memory for
//	vmstat       what the host's memory is used for
//	edac         the errors that the host's memory controllers have counted
//	lspci        what is on the host's PCI buses
//	protections  what the host's kernel protects itself with
//	load         the host's load averages and run queues
//	cgroups      the host's control groups: limits and use
//	containers   the host's containers and what runs in them
//	locks        who waits for whose locks, and deadlocks among them
//	workqueues   what the kernel's workers do, and what waits for them
//	disks        the host's block devices and the requests under way
//	bpf          the eBPF programs, maps and links of the host
//	probes       what is hooked into the kernel's code: kprobes, ftrace, tracepoints, live patches
//	uprobes      what is hooked into the code of the host's programs
//	lsm          what the host's security modules have called at the kernel's hooks
//	about        the kernel's command line, taint, clock, security modules and swap
//	pstore       what earlier kernels left of their logs when they died
//	rcu          whether RCU gets on, and which CPUs it waits for
//	timers       what the kernel's timers will do next
//	irqs         interrupts and softirqs of each CPU
//	pipes        the pipes that processes have open, and what waits in them
//	routes       the host's IPv4 routes
//	routes6      the host's IPv6 routes
//	sysctl       the kernel's settings
//	keys         the names of the keys that the kernel keeps
//	proc         all about one thread: credentials, namespaces, scheduling, memory
//	maps         what is mapped into a process, and how much of it is in memory
//	environ      the arguments and the environment of a process; -secrets must be said
//	mem          memory of a process: mem PID ADDR BYTES; -secrets must be said
//	stack        where in the kernel a thread sleeps: stack PID
//	sym          the address of a symbol of the kernel, or what is at an address
//	x            the kernel's memory as it is, as x of gdb and crash shows it: x/8xg ADDR
//	print        an object of the kernel, by its type: print task_struct init_task; -secrets must be said
//	watch        follow the host's health by RDMA
//	read         bytes of the host's memory, by RDMA
//	write        store bytes in the host's memory, by RDMA: break-glass
//	cas          compare and swap a word of the host's memory, by RDMA: break-glass
//	restore      take back what write or cas stored, by RDMA
//	heal         repair a finding: heal FINDING [-dry-run] [-action A] [-y]
//	undo         take back the repair of a finding, if it can be: undo FINDING [-dry-run] [-y]
//	power        the host's power: status, on, off, cycle, reset, nmi, soft
//	network      the host's traffic: status, quarantine, limit, release
//	events       what happened to the host and to the agent; -f goes on with what comes
//	metrics      what the agent measures of the host and of itself
//	collect      diagnostic data of the host as files: dmesg, memory; downloads resume
//	memory       the host's memory byte for byte: read, write, cosign, leases
//	tasks        what the agent works on; tasks ID -f waits, tasks cancel ID ends one
//	redfish      any resource or action of the service: get, post, patch, delete
//	incidents    faults of the host from the finding to the end; incidents NUMBER -explain tells one as a timeline
//	policy       what a policy would have done about recorded hosts: policy test POLICY RECORDING…
//	journal      what the agent decided and wrote; -verify checks the chain of hashes
//	attest       have the agent prove, by its machine's TPM, which image it runs
//	enroll       certify the TPM of an agent's machine, so that monitors know it by an authority
//	types        make types for hosts whose kernels carry none: BTF of dwarf2json's file
//	golden       unpack a kernel as it was built, for agents to compare hosts with
//	login        log in to an agent and keep it as a context
//	config       contexts: get-contexts, use-context, set-context, delete-context, view
//	agreement    access agreements: keygen, new, sign, verify, show
//	agree        the host's part in an access agreement, run on the host when it is set up
//	image        signed update bundles: keys, building, signing, the first installation
//	flash        update the agents of many hosts, in waves
//	lab          two virtual machines to try all of this on
//	completion   completion for bash, zsh or fish
//	version      the version of this program
//	help         help for a verb
//
// # Exit status
//
//	0  done, and all is well
//	1  an error
//	2  wrong usage
//	3  the host is ill: findings are open, or a repair did not help
//	4  could not tell: no kernel attached, or memory that says nothing certain
//	5  denied: wrong credentials, missing privileges, writing switched off, or no agreement
//
// # Files
//
// $XDG_CONFIG_HOME/backdoor/config.json holds the contexts, readable by its owner only. Passwords are asked for, or read from
// a file or standard input (-password-file, "-" for standard input), and never taken from the command line. What is kept after a
// login is a session token, or the password if -save-password says so.
//
// # Examples
//
//	backdoor login -host https://10.0.0.5 -context dpu1
//	backdoor status
//	backdoor heal runaway-process-1 -dry-run
//	backdoor -image vmcore ps
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
)

func main() {
	collectLess()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// collectLess lets the heap grow further before it is collected: most runs end before that pays. GOGC wins.
func collectLess() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(256 << 20) // from here on as often as it must be
	}
}
