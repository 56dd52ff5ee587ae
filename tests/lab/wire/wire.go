// Package wire is an Ethernet switch in one process.
package wire

// Switch forwards frames.
type Switch struct{}
