// Package interop holds the tests that run the clients of other people's fleets against the real agent, which watches a real host
// in the lab and switches it through the lab's service processor.
//
// The agent runs as a process of this machine (see package native). The clients are bmclib and gofish, and from Debian
// redfishtool, python3-sushy, ansible and fence_redfish; a program that is missing is a skip that names its package.
package interop
