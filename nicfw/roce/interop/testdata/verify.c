/*
 * verify: a librdmacm client that checks every byte.
 *
 *	verify ADDRESS [SEED [ROUNDS]]
 *
 * It connects to the memory service of rxepeer (port 7175), which tells address, key and length of a window in its
 * private data. Word i of the window holds i * 0x9e3779b97f4a7c15, little endian, but for the last megabyte, which is
 * for writing. It reads at random, writes and reads back, counts by atomics, and makes requests that must be refused.
 * ROUNDS (200) is of each kind.
 *
 * Build: cc -O2 -o verify verify.c -lrdmacm -libverbs
 */
#include <arpa/inet.h>
#include <endian.h>
#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX (1 << 20)
#define SCRATCH (1 << 20)

struct window {
	uint64_t va, length;
	uint32_t rkey, pad;
};

static struct rdma_cm_id *id;
static struct window win;
static uint8_t *buf;
static struct ibv_mr *mr;
static const char *host;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void open_connection(void)
{
	struct rdma_addrinfo hints = { .ai_port_space = RDMA_PS_TCP }, *ai;
	struct ibv_qp_init_attr attr = {
		.cap = { .max_send_wr = 64, .max_recv_wr = 4, .max_send_sge = 1, .max_recv_sge = 1 }, .sq_sig_all = 1,
	};
	struct rdma_conn_param param = { .initiator_depth = 16, .responder_resources = 16, .retry_count = 7, .rnr_retry_count = 7 };
	const struct window *w;
	uint8_t timeout = 14;

	if (rdma_getaddrinfo(host, "7175", &hints, &ai))
		die("rdma_getaddrinfo");
	if (rdma_create_ep(&id, ai, NULL, &attr))
		die("rdma_create_ep");
	rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &timeout, sizeof(timeout));
	if (!(mr = ibv_reg_mr(id->pd, buf, MAX, IBV_ACCESS_LOCAL_WRITE)))
		die("ibv_reg_mr");
	if (rdma_connect(id, &param))
		die("rdma_connect");
	w = id->event->param.conn.private_data;
	win.va = be64toh(w->va);
	win.length = be64toh(w->length);
	win.rkey = be32toh(w->rkey);
}

static void close_connection(void)
{
	rdma_disconnect(id);
	ibv_dereg_mr(mr);
	rdma_destroy_ep(id);
}

static int wait_one(void)
{
	struct ibv_wc wc;
	int n;

	while ((n = ibv_poll_cq(id->send_cq, 1, &wc)) == 0)
		;
	if (n < 0)
		die("ibv_poll_cq");
	return wc.status;
}

static void post(enum ibv_wr_opcode op, void *p, uint32_t n, uint64_t va, uint32_t rkey, uint64_t compare, uint64_t swap)
{
	struct ibv_sge sge = { (uintptr_t)p, n, mr->lkey };
	struct ibv_send_wr wr = { .sg_list = &sge, .num_sge = 1, .opcode = op, .send_flags = IBV_SEND_SIGNALED }, *bad;

	if (op == IBV_WR_ATOMIC_CMP_AND_SWP || op == IBV_WR_ATOMIC_FETCH_AND_ADD) {
		wr.wr.atomic.remote_addr = va;
		wr.wr.atomic.rkey = rkey;
		wr.wr.atomic.compare_add = op == IBV_WR_ATOMIC_FETCH_AND_ADD ? swap : compare;
		wr.wr.atomic.swap = swap;
	} else {
		wr.wr.rdma.remote_addr = va;
		wr.wr.rdma.rkey = rkey;
	}
	if (ibv_post_send(id->qp, &wr, &bad))
		die("ibv_post_send");
}

static int run(enum ibv_wr_opcode op, uint32_t n, uint64_t va, uint32_t rkey)
{
	post(op, buf, n, va, rkey, 0, 0);
	return wait_one();
}

static uint8_t expected(uint64_t off)
{
	return (off / 8 * 0x9e3779b97f4a7c15ull) >> (off % 8 * 8);
}

static void check(const uint8_t *p, uint64_t off, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (p[i] != expected(off + i)) {
			fprintf(stderr, "byte %#lx of the window is %#x; want %#x\n", off + i, p[i], expected(off + i));
			exit(1);
		}
}

static void refused(const char *what, enum ibv_wr_opcode op, uint32_t n, uint64_t va, uint32_t rkey)
{
	int status = run(op, n, va, rkey);

	if (status != IBV_WC_REM_ACCESS_ERR) {
		fprintf(stderr, "%s: %s; want %s\n", what, ibv_wc_status_str(status), ibv_wc_status_str(IBV_WC_REM_ACCESS_ERR));
		exit(1);
	}
	close_connection();
	open_connection();
}

int main(int argc, char **argv)
{
	uint64_t total = 0, ro, n, off;
	int rounds;

	host = argv[1];
	srandom(argc > 2 ? atoi(argv[2]) : 1);
	rounds = argc > 3 ? atoi(argv[3]) : 200;
	buf = aligned_alloc(4096, MAX);
	open_connection();
	ro = win.length - SCRATCH;

	for (int i = 0; i < rounds; i++) {
		n = random() % (i % 4 ? 9000 : MAX) + (i > 0);
		off = random() % (ro - n);
		memset(buf, 0xee, n);
		if (run(IBV_WR_RDMA_READ, n, win.va + off, win.rkey))
			die("READ");
		check(buf, off, n);
		total += n;
	}
	printf("READ: %d of up to 1 MiB, %lu bytes right\n", rounds, total);

	for (int i = 0; i < rounds; i++) {
		uint64_t at[16];

		for (int k = 0; k < 16; k++) {
			at[k] = random() % (ro - 65536);
			post(IBV_WR_RDMA_READ, buf + k * 65536, 65536, win.va + at[k], win.rkey, 0, 0);
		}
		for (int k = 0; k < 16; k++)
			if (wait_one())
				die("pipelined READ");
		if (i % 10 == 0)
			for (int k = 0; k < 16; k++)
				check(buf + k * 65536, at[k], 65536);
	}
	printf("READ: %d of 64 KiB, 16 at once, right\n", 16 * rounds);

	for (int i = 0; i < rounds; i++) {
		uint8_t *copy = malloc(200000);

		n = random() % 200000;
		off = ro + 64 + random() % (SCRATCH - 64 - n);
		for (uint64_t k = 0; k < n; k++)
			copy[k] = buf[k] = random();
		if (run(IBV_WR_RDMA_WRITE, n, win.va + off, win.rkey))
			die("WRITE");
		memset(buf, 0, n);
		if (run(IBV_WR_RDMA_READ, n, win.va + off, win.rkey))
			die("READ back");
		if (memcmp(buf, copy, n)) {
			fprintf(stderr, "WRITE %d of %lu bytes: other bytes came back\n", i, n);
			return 1;
		}
		free(copy);
	}
	printf("WRITE: %d of up to 200 kB, read back right\n", rounds);

	uint64_t first = 0;
	for (int i = 0; i < rounds; i++) {
		post(IBV_WR_ATOMIC_FETCH_AND_ADD, buf, 8, win.va + ro, win.rkey, 0, 3);
		if (wait_one())
			die("FETCH_AND_ADD");
		if (i == 0)
			first = *(uint64_t *)buf;
		if (*(uint64_t *)buf != first + 3 * i) {
			fprintf(stderr, "FETCH_AND_ADD %d found %lu; want %lu\n", i, *(uint64_t *)buf, first + 3 * i);
			return 1;
		}
	}
	post(IBV_WR_ATOMIC_CMP_AND_SWP, buf, 8, win.va + ro, win.rkey, first + 3 * rounds, 42);
	if (wait_one() || *(uint64_t *)buf != first + 3 * rounds)
		die("CMP_AND_SWP that fits");
	post(IBV_WR_ATOMIC_CMP_AND_SWP, buf, 8, win.va + ro, win.rkey, 41, 43);
	if (wait_one() || *(uint64_t *)buf != 42)
		die("CMP_AND_SWP that does not fit");
	printf("ATOMIC: %d FETCH_AND_ADD each once, CMP_AND_SWP right\n", rounds);

	refused("READ with a wrong key", IBV_WR_RDMA_READ, 8, win.va, win.rkey + 1);
	refused("READ behind the end", IBV_WR_RDMA_READ, 9, win.va + win.length - 8, win.rkey);
	refused("READ below", IBV_WR_RDMA_READ, 8, win.va - 8, win.rkey);
	refused("READ around", IBV_WR_RDMA_READ, 64, -16, win.rkey);
	refused("WRITE behind the end", IBV_WR_RDMA_WRITE, 9, win.va + win.length - 8, win.rkey);
	refused("WRITE of many packets behind the end", IBV_WR_RDMA_WRITE, 100000, win.va + win.length - 50000, win.rkey);
	printf("refused: 6 of 6 with remote access error\n");
	close_connection();
	printf("ALL RIGHT\n");
	return 0;
}
