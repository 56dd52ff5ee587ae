// SPDX-License-Identifier: GPL-2.0
/*
 * bdedac: a memory controller whose errors are told by hand, for a virtual machine of the tests and for nothing else: QEMU has no
 * memory controller that one of the kernel's drivers would take.
 *
 * It registers two controllers with the kernel's EDAC core, as their drivers do: one with two channels of two slots, of which one is
 * empty, and one without any error. Write "ce N" or "ue N" with the number of a slot to /proc/bdedac for a correctable or uncorrectable
 * error of that slot, "ce -1" for one whose place is not known.
 */
#include <linux/edac.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/proc_fs.h>
#include <linux/uaccess.h>

/* drivers/edac/edac_mc.h, which is not among the headers for modules. */
struct mem_ctl_info *edac_mc_alloc(unsigned int mc_num, unsigned int n_layers, struct edac_mc_layer *layers, unsigned int sz_pvt);
int edac_mc_add_mc_with_groups(struct mem_ctl_info *mci, const struct attribute_group **groups);
void edac_mc_free(struct mem_ctl_info *mci);
void edac_mc_handle_error(const enum hw_event_mc_err_type type, struct mem_ctl_info *mci, const u16 error_count,
			  const unsigned long page_frame_number, const unsigned long offset_in_page, const unsigned long syndrome,
			  const int top_layer, const int mid_layer, const int low_layer, const char *msg, const char *other_detail);

#define SLOTS 4

static struct mem_ctl_info *mcis[2];

static ssize_t tell(struct file *file, const char __user *from, size_t n, loff_t *pos)
{
	char text[16] = "";
	int slot;
	enum hw_event_mc_err_type type;

	if (n >= sizeof(text) || copy_from_user(text, from, n))
		return -EINVAL;
	if (sscanf(text, "ce %d", &slot) == 1)
		type = HW_EVENT_ERR_CORRECTED;
	else if (sscanf(text, "ue %d", &slot) == 1)
		type = HW_EVENT_ERR_UNCORRECTED;
	else
		return -EINVAL;
	if (slot >= SLOTS)
		return -EINVAL;
	edac_mc_handle_error(type, mcis[0], 1, 0x1234, 0x40, 0, slot < 0 ? -1 : slot / 2, slot < 0 ? -1 : slot % 2, -1, "made by hand", "");
	return n;
}

static const struct proc_ops ops = { .proc_write = tell };

static int __init add(int n)
{
	struct edac_mc_layer layers[] = {
		{ .type = EDAC_MC_LAYER_CHANNEL, .size = 2, .is_virt_csrow = false },
		{ .type = EDAC_MC_LAYER_SLOT, .size = SLOTS / 2, .is_virt_csrow = true },
	};
	struct platform_device *pdev = platform_device_register_simple("bdedac", n, NULL, 0);
	struct mem_ctl_info *mci;
	struct dimm_info *dimm;

	if (IS_ERR(pdev))
		return PTR_ERR(pdev);
	mci = edac_mc_alloc(n, ARRAY_SIZE(layers), layers, 0);
	if (!mci)
		return -ENOMEM;
	mci->pdev = &pdev->dev;
	mci->mtype_cap = MEM_FLAG_DDR4;
	mci->edac_ctl_cap = mci->edac_cap = EDAC_FLAG_SECDED;
	mci->mod_name = "bdedac";
	mci->ctl_name = "by hand";
	mci->dev_name = dev_name(&pdev->dev);
	mci_for_each_dimm(mci, dimm) {
		if (dimm->idx == 1)
			continue; /* an empty slot */
		dimm->nr_pages = 1024 << dimm->idx;
		dimm->grain = 8;
		dimm->mtype = MEM_RDDR4;
		dimm->edac_mode = EDAC_SECDED;
		dimm->smbios_handle = n == 0 && dimm->idx == 0 ? 0x1100 : 0; /* QEMU's first */
		snprintf(dimm->label, sizeof(dimm->label), "CPU%d_DIMM%u", n, dimm->idx);
	}
	mcis[n] = mci;
	return edac_mc_add_mc_with_groups(mci, NULL);
}

static int __init begin(void)
{
	int err = add(0);

	if (!err)
		err = add(1);
	if (!err && !proc_create("bdedac", 0200, NULL, &ops))
		err = -ENOMEM;
	return err; /* the machine ends with the test that it is for: nothing is taken back */
}
module_init(begin);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Memory controllers whose errors are told by hand, for tests");
