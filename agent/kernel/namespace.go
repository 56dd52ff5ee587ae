package kernel

import "fmt"

// PIDIn is the ID of a thread in a PID namespace.
type PIDIn struct {
	Namespace uint64 `json:"namespace"` // its inode, as in /proc/PID/ns/pid
	PID       int    `json:"pid"`
}

// Namespaces are the namespaces of a task (struct nsproxy, include/linux/nsproxy.h) by their inodes, as in /proc/PID/ns.
type Namespaces struct {
	PID      uint64 `json:"pid"`
	Mount    uint64 `json:"mount"`
	Net      uint64 `json:"net"`
	UTS      uint64 `json:"uts"`
	IPC      uint64 `json:"ipc"`
	Cgroup   uint64 `json:"cgroup"`
	User     uint64 `json:"user"`
	Hostname string `json:"hostname"` // of UTS
}

// idWalk finds the IDs and the namespaces of tasks.
type idWalk struct {
	v                                                 *View
	task, pid, upid, proxy, cred                      *shape
	pidNS, mountNS, netNS, utsNS, ipcNS, cgNS, userNS *shape
	numbers, upidSize                                 uint64
	inums                                             map[VirtAddr]uint64
}

const maxPIDLevel = 32 // MAX_PID_NS_LEVEL

func (v *View) idWalk() (*idWalk, error) {
	r := resolver{img: v.img}
	w := &idWalk{v: v, inums: make(map[VirtAddr]uint64)}
	w.task = r.shape("task_struct", "thread_pid", "nsproxy", "real_cred")
	w.pid = r.shape("pid", "level")
	w.numbers = r.field("pid", 0, "numbers")
	w.upid = r.shape("upid", "nr", "ns")
	w.upidSize = r.size("upid")
	w.proxy = r.shape("nsproxy", "uts_ns", "ipc_ns", "mnt_ns", "net_ns", "cgroup_ns")
	w.cred = r.shape("cred", "user_ns")
	w.pidNS = r.shape("pid_namespace", "ns.inum")
	w.mountNS = r.shape("mnt_namespace", "ns.inum")
	w.netNS = r.shape("net", "ns.inum")
	w.utsNS = r.shape("uts_namespace", "ns.inum", "name.nodename[]")
	w.ipcNS = r.shape("ipc_namespace", "ns.inum")
	w.cgNS = r.shape("cgroup_namespace", "ns.inum")
	w.userNS = r.shape("user_namespace", "ns.inum")
	return w, r.err
}

// pids returns the IDs of a thread, from the host's namespace to its own; none if it has ended.
func (w *idWalk) pids(task VirtAddr) ([]PIDIn, error) {
	t, err := w.v.thing(w.task, task)
	if err != nil {
		return nil, err
	}
	p := t.ptr("thread_pid")
	if p == 0 {
		return nil, nil
	}
	s, err := w.v.thing(w.pid, p)
	if err != nil {
		return nil, err
	}
	level := s.num("level")
	if level > maxPIDLevel {
		return nil, s.corrupt("in %d namespaces", level+1)
	}
	var all []PIDIn
	for i := range level + 1 {
		u, err := w.v.thing(w.upid, p+VirtAddr(w.numbers+i*w.upidSize))
		if err != nil {
			return nil, err
		}
		inum, err := w.inum(w.pidNS, u.ptr("ns"))
		if err != nil {
			return nil, err
		}
		if nr := u.int("nr"); nr < 0 || nr > pidMax {
			return nil, s.corrupt("PID %d in namespace %d", nr, inum)
		}
		all = append(all, PIDIn{inum, u.int("nr")})
	}
	return all, nil
}

func (w *idWalk) inum(s *shape, at VirtAddr) (uint64, error) {
	if n, ok := w.inums[at]; ok || at == 0 {
		return n, nil
	}
	t, err := w.v.thing(s, at)
	if err != nil {
		return 0, err
	}
	w.inums[at] = t.num("ns.inum")
	return w.inums[at], nil
}

// namespaces returns the namespaces of a task; it is ErrNotFound if it has ended.
func (w *idWalk) namespaces(task VirtAddr) (ns Namespaces, err error) {
	t, err := w.v.thing(w.task, task)
	if err != nil {
		return ns, err
	}
	ids, err := w.pids(task)
	if err != nil {
		return ns, err
	}
	if len(ids) > 0 {
		ns.PID = ids[len(ids)-1].Namespace
	}
	p := t.ptr("nsproxy")
	if p == 0 {
		return ns, fmt.Errorf("namespaces of the task at %v, which has ended: %w", task, ErrNotFound)
	}
	proxy, err := w.v.thing(w.proxy, p)
	if err != nil {
		return ns, err
	}
	cred, err := w.v.thing(w.cred, t.ptr("real_cred"))
	if err != nil {
		return ns, err
	}
	for _, n := range []struct {
		to *uint64
		s  *shape
		at VirtAddr
	}{{&ns.Mount, w.mountNS, proxy.ptr("mnt_ns")}, {&ns.Net, w.netNS, proxy.ptr("net_ns")}, {&ns.UTS, w.utsNS, proxy.ptr("uts_ns")},
		{&ns.IPC, w.ipcNS, proxy.ptr("ipc_ns")}, {&ns.Cgroup, w.cgNS, proxy.ptr("cgroup_ns")}, {&ns.User, w.userNS, cred.ptr("user_ns")}} {
		if *n.to, err = w.inum(n.s, n.at); err != nil {
			return ns, err
		}
	}
	uts, err := w.v.thing(w.utsNS, proxy.ptr("uts_ns"))
	ns.Hostname = uts.text("name.nodename")
	return ns, err
}
