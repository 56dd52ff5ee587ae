// Package roce is RoCEv2 reliable connections in pure Go: an ordinary verbs client reads, writes and atomically changes
// memory that this side exports, over a plain UDP port, without an RDMA device and without C.
package roce
