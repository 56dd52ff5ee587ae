// Package early is what the first program of a machine needs before anything else, be it the loader or the agent: the pseudo
// file systems, the drivers of the devices that are there, and the hardware watchdog. It has no network.
package early

// Outcome is how a step ended.
type Outcome string

const (
	// Done: the step did what it is for.
	Done Outcome = "done"
	// Absent: there was nothing to do it with (no disk, no watchdog), which was found out for certain.
	Absent Outcome = "absent"
	// Unclear: it was not done, or not all of it, or it cannot be told; Err says why.
	Unclear Outcome = "unclear"
)
