/*
 * fetch: a librdmacm client that copies memory to standard output.
 *
 *	fetch ADDRESS START LENGTH
 *
 * It connects to a memory service on port 7175, which tells address, key and length of a window in its private data, and reads
 * LENGTH bytes from START on in the window: in pieces of many sizes, at odd addresses too, several at a time.
 *
 * Build: cc -O2 -o fetch fetch.c -lrdmacm -libverbs
 */
#include <endian.h>
#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEEP 8
#define PIECE (1 << 18)

struct window {
	uint64_t va, length;
	uint32_t rkey, pad;
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	struct rdma_addrinfo hints = { .ai_port_space = RDMA_PS_TCP }, *ai;
	struct ibv_qp_init_attr attr = {
		.cap = { .max_send_wr = 64, .max_recv_wr = 4, .max_send_sge = 1, .max_recv_sge = 1 }, .sq_sig_all = 1,
	};
	struct rdma_conn_param param = { .initiator_depth = 16, .responder_resources = 16, .retry_count = 7, .rnr_retry_count = 7 };
	const struct window *w;
	struct rdma_cm_id *id;
	struct ibv_mr *mr;
	uint64_t start, left, va;
	uint32_t rkey, size[DEEP], seed = 1;
	uint8_t *buf, timeout = 14;

	if (argc != 4)
		return 2;
	start = strtoull(argv[2], NULL, 0);
	left = strtoull(argv[3], NULL, 0);
	if (rdma_getaddrinfo(argv[1], "7175", &hints, &ai))
		die("rdma_getaddrinfo");
	if (rdma_create_ep(&id, ai, NULL, &attr))
		die("rdma_create_ep");
	rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &timeout, sizeof(timeout));
	buf = aligned_alloc(4096, DEEP * PIECE);
	if (!buf || !(mr = ibv_reg_mr(id->pd, buf, DEEP * PIECE, IBV_ACCESS_LOCAL_WRITE)))
		die("ibv_reg_mr");
	if (rdma_connect(id, &param))
		die("rdma_connect");
	w = id->event->param.conn.private_data;
	va = be64toh(w->va) + start;
	rkey = be32toh(w->rkey);
	while (left) {
		int n = 0, done = 0;

		for (; n < DEEP && left; n++) {
			struct ibv_sge sge = { (uintptr_t)(buf + n * PIECE), 0, mr->lkey };
			struct ibv_send_wr wr = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_READ, .send_flags = IBV_SEND_SIGNALED }, *bad;

			seed = seed * 1664525 + 1013904223;
			sge.length = seed >> 8 & 1 ? PIECE : (seed >> 9) % PIECE + 1;
			if (sge.length > left)
				sge.length = left;
			size[n] = sge.length;
			wr.wr.rdma.remote_addr = va;
			wr.wr.rdma.rkey = rkey;
			if (ibv_post_send(id->qp, &wr, &bad))
				die("ibv_post_send");
			va += sge.length;
			left -= sge.length;
		}
		while (done < n) {
			struct ibv_wc wc;
			int k = ibv_poll_cq(id->send_cq, 1, &wc);

			if (k < 0)
				die("ibv_poll_cq");
			if (k && wc.status) {
				fprintf(stderr, "READ: %s\n", ibv_wc_status_str(wc.status));
				return 1;
			}
			done += k;
		}
		for (int i = 0; i < n; i++)
			for (uint32_t off = 0; off < size[i];) {
				ssize_t k = write(1, buf + i * PIECE + off, size[i] - off);

				if (k <= 0)
					die("write");
				off += k;
			}
	}
	rdma_disconnect(id);
	return 0;
}
