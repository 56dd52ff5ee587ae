/*
 * A plugin of QEMU's TCG (docs/devel/tcg-plugins.rst, API version 1, QEMU 6.0 and later) that counts how often each instruction of the guest's
 * kernel is executed, and all of its programs' together. At each execution of the mark, a NOP of eight bytes that no compiler emits, it
 * writes the counts to a file: pairs of an address, 0 for programs, and a count, 8 bytes each. The guest has one CPU.
 *
 * Debian has no header of the API, so what is used of it is declared here.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef uint64_t qemu_plugin_id_t;
typedef void (*tb_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*insn_cb)(unsigned int, void *);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_cb);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, int op, void *, uint64_t);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, insn_cb, int flags, void *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

#define SLOTS (1u << 22)
static struct { uint64_t addr, count; } slots[SLOTS]; /* slot 0 is for programs */
static char out[4096];
static int marks;

static uint64_t *counter(uint64_t addr)
{
	if (!(addr >> 63))
		return &slots[0].count;
	for (uint64_t i = addr * 0x9e3779b97f4a7c15ull >> 42;; i++) {
		i = i % (SLOTS - 1) + 1;
		if (!slots[i].addr)
			slots[i].addr = addr;
		if (slots[i].addr == addr)
			return &slots[i].count;
	}
}

static void mark(unsigned int cpu, void *data)
{
	char name[4200];
	snprintf(name, sizeof name, "%s.%d", out, marks++);
	FILE *f = fopen(name, "w");
	for (uint64_t i = 0; f && i < SLOTS; i++)
		if (slots[i].count)
			fwrite(&slots[i], sizeof slots[i], 1, f);
	if (!f || fclose(f)) {
		perror(name);
		exit(1);
	}
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	static const unsigned char nop[8] = {0x0f, 0x1f, 0x84, 0x00, 0x0d, 0xd0, 0x0d, 0xba};
	for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		if (qemu_plugin_insn_size(insn) == 8 && !memcmp(qemu_plugin_insn_data(insn), nop, 8))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, mark, 0, NULL);
		qemu_plugin_register_vcpu_insn_exec_inline(insn, 0 /* add */, counter(qemu_plugin_insn_vaddr(insn)), 1);
	}
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
	for (int i = 0; i < argc; i++)
		if (!strncmp(argv[i], "out=", 4))
			snprintf(out, sizeof out, "%s", argv[i] + 4);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
