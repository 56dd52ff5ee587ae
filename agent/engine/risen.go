package engine

import (
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// risen has the processes that have become root's from nowhere. A process becomes so by execve(2) of a program that is root's, or because it may
// (setuid(2)); who overwrites its credentials, or has the kernel give it others, needs neither. What a program was started with tells (kernel.Exec):
//   - it was started as another user's, by one who had no right to become root, and has all rights now;
//   - or before it had none, has started one program since, and that was started by root.
//
// Whoever has started two programs since it was last seen without rights may have had the first one lift him.
type risen struct {
	roots map[process]bool // of root's in the latest list
	news  []rising         // that were not in the list before
	tasks []kernel.Task    // of which two lists say the same
}

// process is one, whoever has its PID later.
type process struct {
	pid   int
	start time.Duration
}

func processOf(t *kernel.Task) process { return process{t.PID, t.Start} }

// rising is a process of root's that is to be looked at once more.
type rising struct {
	task kernel.Task
	was  *kernel.Task // when it was not root's; nil if it was not seen then
}

const (
	mostRisen = 64
	// mostOrigins is how many processes are looked into in one pass.
	mostOrigins = 256
	// allRights is a part of root's capabilities that nobody else is given together: CAP_SETUID, CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_PTRACE, CAP_SYS_ADMIN.
	allRights = 1<<7 | 1<<16 | 1<<17 | 1<<19 | 1<<21
)

// lifted reports whether a process that is root's has become so from nowhere. was is what it was before, or nil.
func lifted(was, now *kernel.Task, x kernel.Exec) bool {
	switch {
	case x.UID != 0 && x.EUID != 0:
		return !x.Secure && x.Rights&allRights == allRights
	case was != nil && x.UID == 0:
		return !was.MaySetUID && was.UID != 0 && now.Execs == was.Execs+1
	}
	return false
}

// see compares a list of all tasks with that before. origin looks into one.
func (r *risen) see(before, now []kernel.Task, origin func(kernel.Task) (kernel.Exec, error)) {
	roots := make(map[process]bool, len(r.roots)+8)
	at := make(map[process]*kernel.Task) // those that are looked at
	for _, x := range r.news {
		at[processOf(&x.task)] = nil
	}
	for i := range r.tasks {
		at[processOf(&r.tasks[i])] = nil
	}
	fresh := make(map[process]*rising)
	for i := range now {
		t := &now[i]
		if t.UID != 0 || t.KThread || t.PID != t.TGID || t.State == "Z" {
			continue
		}
		k := processOf(t)
		roots[k] = true
		if _, ok := at[k]; ok {
			at[k] = t
		} else if !r.roots[k] && len(fresh) < mostOrigins {
			fresh[k] = &rising{task: *t}
		}
	}
	if len(fresh) > 0 {
		for i := range before {
			if x := fresh[processOf(&before[i])]; x != nil {
				x.was = &before[i]
			}
		}
	}
	var tasks []kernel.Task
	var news []rising
	for i := range r.tasks { // for as long as it is root's, whatever it starts
		if t := at[processOf(&r.tasks[i])]; t != nil {
			tasks = append(tasks, *t)
		}
	}
	is := func(was, t *kernel.Task) bool {
		x, err := origin(*t)
		return err == nil && lifted(was, t, x)
	}
	for _, x := range r.news {
		if t := at[processOf(&x.task)]; t != nil && len(tasks) < mostRisen && is(x.was, t) {
			tasks = append(tasks, *t)
		}
	}
	for _, x := range fresh {
		if len(news) < mostRisen && is(x.was, &x.task) {
			if x.was != nil {
				was := *x.was
				x.was = &was // the list is not kept
			}
			news = append(news, *x)
		}
	}
	r.roots, r.news, r.tasks = roots, news, tasks
}
