// Package forward measures how many frames a second a DPU forwards: the packet path of nicfw/datapath against a Linux bridge, in the same
// guest with the same cards, one after the other in turn.
//
//	go test -bench Forwarding ./tests/forward
package forward
