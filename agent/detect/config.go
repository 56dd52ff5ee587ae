package detect

import (
	"fmt"
	"time"
)

// UIDRange is First to Last, both included.
type UIDRange struct {
	First uint32 `json:"first"`
	Last  uint32 `json:"last"`
}

// Contains reports whether uid is in the range.
func (r UIDRange) Contains(uid uint32) bool { return uid >= r.First && uid <= r.Last }

// Config holds what operators may tune. Start from DefaultConfig: the zero value of most fields is not valid.
type Config struct {
	// Heartbeat and Tasks are how often the two kinds of samples are taken.
	Heartbeat, Tasks time.Duration
	// StallSuspect and StallVerdict are how long a busy CPU may go without a timer tick.
	StallSuspect, StallVerdict time.Duration
	// IdleVerdict is how long an idle CPU may go without any sign of life beyond the timer event that it had programmed.
	IdleVerdict time.Duration
	// Silent is how long the whole host may show no progress, or its memory be out of reach.
	Silent time.Duration
	// RunawayShare is the share of one CPU (0 to 1), averaged over RunawayFor, from which on a thread is a runaway.
	RunawayShare float64
	RunawayFor   time.Duration
	// RunawayExempt are users whose processes may use all the CPU they get. Names of processes are no ground for an
	// exemption: anybody can choose his own.
	RunawayExempt []UIDRange
	// BombGrowth is how many tasks more within two seconds are a fork bomb on a host of up to four CPUs.
	BombGrowth int
	// HogETA is how soon memory must come to its end at the present rate, and HogFloor the share of it (0 to 1) below which it
	// is low, for a process to be a hog.
	HogETA   time.Duration
	HogFloor float64
	// RCUFor is how long one grace period of RCU may last, HungFor how long a task may wait in the kernel without being woken.
	RCUFor, HungFor time.Duration
	// WorkFor is how long the first in line of a workqueue may wait, IOFor how long a disk may have a request, BootFor how long
	// the host may take to come up.
	WorkFor, IOFor, BootFor time.Duration
	// FloodPackets is how many frames a second of the host are a flood, and FloodSYNs how many connections a second that it begins and
	// does not use.
	FloodPackets, FloodSYNs int
	// CorrectedADay is how many errors of one memory module, corrected within a day, say that it is failing.
	CorrectedADay int
}

// DefaultConfig returns the settings that suit a server.
func DefaultConfig() Config {
	return Config{
		Heartbeat:    60 * time.Millisecond,
		Tasks:        700 * time.Millisecond,
		StallSuspect: 220 * time.Millisecond,
		StallVerdict: time.Second,
		IdleVerdict:  5 * time.Second,
		Silent:       5 * time.Second,
		RunawayShare: 0.9,
		RunawayFor:   60 * time.Second,
		BombGrowth:   128,
		HogETA:       3 * time.Second,
		HogFloor:     0.05,
		RCUFor:       12 * time.Second,
		HungFor:      30 * time.Second,
		WorkFor:      30 * time.Second,
		IOFor:        20 * time.Second,
		BootFor:      5 * time.Minute,
		FloodPackets: 200000,
		FloodSYNs:    1000,

		CorrectedADay: 10,
	}
}

// Check returns the first setting that makes no sense.
func (c Config) Check() error {
	for _, d := range []struct {
		name string
		d    time.Duration
		min  time.Duration
	}{
		{"heartbeat", c.Heartbeat, time.Millisecond},
		{"tasks", c.Tasks, time.Millisecond},
		{"stallSuspect", c.StallSuspect, 20 * time.Millisecond},
		{"stallVerdict", c.StallVerdict, c.StallSuspect},
		{"idleVerdict", c.IdleVerdict, c.StallVerdict},
		{"silent", c.Silent, c.StallVerdict},
		{"runawayFor", c.RunawayFor, c.Tasks},
		{"hogETA", c.HogETA, 100 * time.Millisecond},
		{"rcuFor", c.RCUFor, time.Second},
		{"hungFor", c.HungFor, 2 * c.Tasks},
		{"workFor", c.WorkFor, 2 * jamsEvery},
		{"ioFor", c.IOFor, 2 * jamsEvery},
		{"bootFor", c.BootFor, 10 * time.Second},
	} {
		if d.d < d.min || d.d > 24*time.Hour {
			return fmt.Errorf("detector setting %s is %v; it must be between %v and 24h", d.name, d.d, d.min)
		}
	}
	if !(c.RunawayShare > 0 && c.RunawayShare <= 1) {
		return fmt.Errorf("detector setting runawayShare is %v; it is a share of one CPU, above 0 and at most 1", c.RunawayShare)
	}
	if c.BombGrowth < 16 || c.BombGrowth > 1<<20 {
		return fmt.Errorf("detector setting bombGrowth is %d; it is a number of tasks, 16 to %d", c.BombGrowth, 1<<20)
	}
	if !(c.HogFloor >= 0 && c.HogFloor < 1) {
		return fmt.Errorf("detector setting hogFloor is %v; it is a share of the memory, from 0 to below 1", c.HogFloor)
	}
	if c.FloodPackets < 1 || c.FloodSYNs < 1 {
		return fmt.Errorf("detector settings floodPackets %d and floodSYNs %d: they are numbers a second, at least 1", c.FloodPackets, c.FloodSYNs)
	}
	if c.CorrectedADay < 1 {
		return fmt.Errorf("detector setting correctedADay is %d; it is a number of errors, at least 1", c.CorrectedADay)
	}
	for _, r := range c.RunawayExempt {
		if r.First > r.Last {
			return fmt.Errorf("exempt user range %d to %d is the wrong way round", r.First, r.Last)
		}
	}
	return nil
}

// Keep is how far back a Pass must reach for these detectors.
func (c Config) Keep() (beats, tasks time.Duration) {
	return max(c.IdleVerdict, c.Silent, c.StallVerdict) + 5*time.Second, max(c.RunawayFor, c.HungFor) + 2*c.Tasks + time.Second
}

// Detectors returns all detectors with these settings.
func Detectors(c Config) []Detector {
	return []Detector{panicDetector(c), hostSilent(c), cpuStall(c), runawayProcess(c), forkBomb(c), memoryHog(c), exhaustion(c),
		softLockup(c), oops(c), rcuStall(c), hungTask(c), tampering(c),
		stuckWork(c), stuckIO(c), thrashing(c), tainted(c), memoryErrors(c), clock(c), clockBack(c), bootStuck(c),
		filling(c), linkFlaps(c), logged(c), storm(c), strangers(c), injected(c), starved(c)}
}
