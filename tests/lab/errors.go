package lab

import (
	"fmt"
	"strings"
)

// BootError means that a machine started and did not get to where it should: the fault is the kernel's, the image's or
// our program's, and its console says which.
type BootError struct {
	Machine string   // "host" or "dpu"
	Waiting string   // what was waited for
	Console []string // the last lines of the serial console
	Err     error    // why the waiting ended; never nil
}

func (e *BootError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "boot %s: waiting for %s: %v", e.Machine, e.Waiting, e.Err)
	if len(e.Console) == 0 {
		b.WriteString("; its console is empty")
		return b.String()
	}
	b.WriteString("; the last lines of its console:")
	for _, l := range e.Console {
		b.WriteString("\n\t" + l)
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *BootError) Unwrap() error { return e.Err }

// InfraError means that the lab itself could not be set up or has broken: a program is missing, memory is short, a
// process was killed. It says nothing about the software under test.
type InfraError struct {
	Op   string // what was being done
	Err  error  // never nil
	Next string // what the user can do about it
}

func (e *InfraError) Error() string {
	if e.Next == "" {
		return fmt.Sprintf("lab: %s: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("lab: %s: %v (%s)", e.Op, e.Err, e.Next)
}

// Unwrap returns the cause.
func (e *InfraError) Unwrap() error { return e.Err }
