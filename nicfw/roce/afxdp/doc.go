// Package afxdp is a roce.Link over an AF_XDP socket: packets go between a network interface's queue and the program's
// memory, past the system's network stack.
//
// Against roce.ListenUDP, it sees the headers around a packet, so that the ICRC is a whole check of 32 bits on IPv4, too,
// and a busy poll takes no system call for receiving. It needs Linux 5.9 (6.6 for a path MTU of 4096), privileges, and
// packets that arrive at the queue it is bound to: set the interface to one queue, or steer UDP port 4791 there
// (ethtool -N). What is not RoCEv2 for its address passes to the system as before, which also resolves the link addresses of
// peers.
//
// Frames that a virtual interface carries unsegmented (large sends of a neighbour in the same kernel, in generic mode)
// are no RoCEv2 packets here: they are dropped and counted as BadLength. Native mode makes the sender segment them.
package afxdp
