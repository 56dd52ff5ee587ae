# What drgn reads in a core, as JSON, for comparison with package kernel: drgn -c CORE -s VMLINUX compare.py [ps|warm].
import json, sys, time
from drgn import Object, cast
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.idr import idr_for_each

out = {}


def text(s):
    return s.string_().decode(errors="replace")


def read_tasks():
    tasks = []
    for t in for_each_task(prog):
        c = t.real_cred
        tasks.append({
            "addr": t.value_(), "pid": t.pid.value_(), "tgid": t.tgid.value_(), "ppid": t.real_parent.tgid.value_(), "comm": text(t.comm),
            "uid": c.euid.val.value_(), "utime": t.utime.value_(), "stime": t.stime.value_(), "runtime": t.se.sum_exec_runtime.value_(),
            "start": t.start_time.value_(), "switches": (t.nvcsw + t.nivcsw).value_(), "permitted": c.cap_permitted.cap[0].value_() | c.cap_permitted.cap[1].value_() << 32,
            "policy": t.policy.value_(), "nice": t.static_prio.value_() - 120, "seccomp": t.seccomp.mode.value_(), "blocked": t.blocked.sig[0].value_(),
            "oom": t.signal.oom_score_adj.value_(),
        })
    return tasks


if sys.argv[1:] == ["warm"]:  # how long ps alone takes, once all is loaded: the best of 7
    read_tasks()
    best = 1e9
    for _ in range(7):
        began = time.perf_counter()
        read_tasks()
        best = min(best, time.perf_counter() - began)
    print(int(best * 1e9))
    sys.exit()

tasks = read_tasks()
out["tasks"] = tasks
if len(sys.argv) > 1:  # ps alone, for the clock
    for t in tasks:
        print(t["pid"], t["ppid"], t["comm"])
    sys.exit()

out["modules"] = [{"addr": m.value_(), "name": text(m.name), "base": m.core_layout.base.value_()}
                  for m in list_for_each_entry("struct module", prog["modules"].address_of_(), "list")]

groups = []


def walk(cg, path):
    memory = cg.subsys[prog.constant("memory_cgrp_id")]
    pids = cg.subsys[prog.constant("pids_cgrp_id")]
    g = {"addr": cg.value_(), "path": path or "/", "id": cg.kn.id.value_()}
    if path and memory:
        m = cast("struct mem_cgroup *", memory)
        g["max"], g["current"] = m.memory.max.value_(), m.memory.usage.counter.value_()
    if path and pids:
        p = cast("struct pids_cgroup *", pids)
        g["pids"], g["pidsMax"] = p.counter.counter.value_(), p.limit.counter.value_()
    groups.append(g)
    for css in list_for_each_entry("struct cgroup_subsys_state", cg.self.children.address_of_(), "sibling"):
        child = cast("struct cgroup *", css)
        walk(child, path + "/" + text(child.kn.name))


walk(prog["cgrp_dfl_root"].cgrp.address_of_(), "")
out["cgroups"] = groups

pools = []
for id, entry in idr_for_each(prog["worker_pool_idr"].address_of_()):
    entry = cast("struct worker_pool *", entry)
    pools.append({"id": id, "cpu": entry.cpu.value_(), "workers": entry.nr_workers.value_(), "idle": entry.nr_idle.value_()})
out["pools"] = pools

timers = []
for cpu in for_each_online_cpu(prog):
    for base in range(2):
        b = per_cpu(prog["timer_bases"], cpu)[base]
        for v in b.vectors:
            at = v.first
            while at:
                timers.append(at.value_())
                at = at.next
out["timers"] = timers

out["rcu"] = prog["rcu_state"].gp_seq.value_()
out["tainted"] = prog["tainted_mask"].value_()
# Of each lock that was found: who drgn says has it.
locks = {}
for spec in sys.stdin.read().split():
    kind, addr = spec.split(":")
    at = int(addr, 0)
    if kind == "mutex":
        locks[addr] = Object(prog, "struct mutex", address=at).owner.counter.value_() & 0xfffffffffffffff8
    elif kind == "rwsem":
        locks[addr] = Object(prog, "struct rw_semaphore", address=at).owner.counter.value_() & 0xfffffffffffffff8
    elif kind == "rtmutex":
        locks[addr] = Object(prog, "struct rt_mutex_base", address=at).owner.value_() & 0xfffffffffffffffe
out["locks"] = locks
json.dump(out, sys.stdout)
