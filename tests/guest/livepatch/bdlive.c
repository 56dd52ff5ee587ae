// SPDX-License-Identifier: GPL-2.0
/* A live patch for tests: what /proc/cmdline shows comes from here. It goes into no image. */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

static int bdlive_cmdline_show(struct seq_file *m, void *v)
{
	seq_puts(m, "patched while it runs\n");
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = bdlive_cmdline_show },
	{ },
};

static struct klp_object objs[] = {
	{ .funcs = funcs }, /* of the kernel itself */
	{ },
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs };

static int __init begin(void)
{
	return klp_enable_patch(&patch);
}

static void __exit end(void)
{
}

module_init(begin);
module_exit(end);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
MODULE_DESCRIPTION("A live patch of one function, for tests");
