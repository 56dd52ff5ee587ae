// Package uverbs lets a verbs device of the kernel (an RDMA adapter, or rxe) serve READ, WRITE and atomic operations on
// memory of this program, without C: it speaks the kernel's user verbs interface itself.
//
// The program is a passive target: it makes protection domains, memory regions and queue pairs and then has no part in what
// happens, so that no work queue, doorbell or completion is ever touched. That is all that a health page or a journal needs.
// Connections are made with what both sides told each other by other means (roce.Remote).
//
// What a user must know:
//
//   - The kernel and the device check keys, rights and bounds, as they do it. Windows of host memory, which must pass
//     Guard and be journalled, cannot be served in this way; package roce serves those.
//   - Queue pair numbers and keys come from the device. Those of rxe can be guessed: keys hold eight random bits. Packet
//     numbers are random, here too.
//   - An expired or revoked region is taken from the device; until that is done, which takes microseconds, it serves.
//   - Atomic operations are atomic among each other, not against stores of this program, unless the device says more.
//   - It was tried with rxe of Linux 6.1 and 6.12. Devices whose driver wants memory or doorbells of the program (mlx5 and others)
//     refuse to make a completion queue, and Open says so.
//
// Source: include/uapi/rdma/ib_user_verbs.h of Linux 6.1, whose structs the commands are; ib_uverbs(7).
package uverbs
