package kernel

import (
	"fmt"
	"iter"
	"strings"
)

// Mount is a mounted file system (struct mount, fs/mount.h), as /proc/PID/mountinfo has it.
type Mount struct {
	Addr    VirtAddr `json:"addr"`
	ID      int      `json:"id"`
	Parent  int      `json:"parent"`
	Dev     string   `json:"dev"`  // major:minor
	Root    string   `json:"root"` // of the mount in its file system
	Path    string   `json:"path"` // where it is mounted
	Options string   `json:"options"`
	FS      string   `json:"fs"` // type
	Source  string   `json:"source"`
	Super   string   `json:"super"` // options of the file system that all have
}

const (
	maxMounts = 1 << 17
	mntCursor = 0x10000000 // MNT_CURSOR: a reader of mountinfo, of v5.8 to v6.7
)

// mountOptions are the MNT_… flags of include/linux/mount.h, superOptions the SB_… of include/linux/fs.h.
var (
	mountOptions = []struct {
		flag uint64
		name string
	}{{0x01, "nosuid"}, {0x02, "nodev"}, {0x04, "noexec"}, {0x08, "noatime"}, {0x10, "nodiratime"}, {0x20, "relatime"}, {0x80, "nosymfollow"}}
	superOptions = []struct {
		flag uint64
		name string
	}{{1 << 4, "sync"}, {1 << 7, "dirsync"}, {1 << 6, "mand"}, {1 << 25, "lazytime"}}
)

// Mounts lists the mounts of the namespace of a process; 1 is that of the host. What the root of the process is mounted on
// (since v7.0 an empty file system) is left out, as in /proc/PID/mountinfo.
func (v *View) Mounts(pid int) iter.Seq2[Mount, error] {
	return settled(v, "walk mounts", func() ([]Mount, error) {
		ns, root, err := v.mountNamespace(pid)
		if err != nil {
			return nil, err
		}
		w, err := v.pathWalk()
		if err != nil {
			return nil, err
		}
		below, err := w.below(root)
		if err != nil {
			return nil, err
		}
		var all []Mount
		add := func(at VirtAddr) error {
			if below[at] {
				return nil
			}
			m, ok, err := w.describe(at)
			if ok {
				all = append(all, m)
			}
			return err
		}
		r := resolver{img: v.img}
		// Since Linux commit 2eea9ce4310d ("mounts: keep list of mounts in an rbtree") (in v6.8) there is a tree.
		if node, err := v.img.types.field("mount", "mnt_node"); err == nil {
			root := r.field("mnt_namespace", 8, "mounts")
			if r.err != nil {
				return nil, r.err
			}
			return all, v.rbtree("mount", ns+VirtAddr(root), node.Offset, maxMounts, add)
		}
		head, node := r.field("mnt_namespace", 16, "list"), r.field("mount", 16, "mnt_list")
		if r.err != nil {
			return nil, r.err
		}
		err = v.list("mount", ns+VirtAddr(head), node, maxMounts, add)
		return all, err
	})
}

// mountNamespace returns the mount namespace of a process, and the vfsmount that its root is in.
func (v *View) mountNamespace(pid int) (ns, root VirtAddr, err error) {
	r := resolver{img: v.img}
	task := r.shape("task_struct", "nsproxy", "fs")
	proxy := r.shape("nsproxy", "mnt_ns")
	fs := r.shape("fs_struct", "root.mnt")
	if r.err != nil {
		return 0, 0, r.err
	}
	for t, err := range v.Tasks() {
		if err != nil {
			return 0, 0, err
		}
		if t.PID != pid {
			continue
		}
		s, err := v.thing(task, t.Addr)
		if err != nil {
			return 0, 0, err
		}
		p, f := s.ptr("nsproxy"), s.ptr("fs")
		if p == 0 || f == 0 {
			return 0, 0, fmt.Errorf("process %d has ended and has no namespaces: %w", pid, ErrNotFound)
		}
		n, err := v.thing(proxy, p)
		if err != nil {
			return 0, 0, err
		}
		place, err := v.thing(fs, f)
		return n.ptr("mnt_ns"), place.ptr("root.mnt"), err
	}
	return 0, 0, fmt.Errorf("process %d: %w", pid, ErrNotFound)
}

// below returns the mounts that a mount stands on, given by its vfsmount.
func (w *pathWalk) below(vfsmount VirtAddr) (map[VirtAddr]bool, error) {
	m, err := w.of(vfsmount)
	if err != nil {
		return nil, err
	}
	all := make(map[VirtAddr]bool)
	for parent := m.ptr("mnt_parent"); parent != m.addr() && len(all) < maxDepth; parent = m.ptr("mnt_parent") {
		all[parent] = true
		if m, err = w.at(parent); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// describe reads a mount; ok is false if it is none.
func (w *pathWalk) describe(at VirtAddr) (m Mount, ok bool, err error) {
	t, err := w.at(at)
	if err != nil {
		return m, false, err
	}
	flags := t.num("mnt.mnt_flags")
	if flags&mntCursor != 0 {
		return m, false, nil
	}
	super, err := w.superBlock(t.ptr("mnt.mnt_sb"))
	if err != nil {
		return m, false, err
	}
	parent, err := w.at(t.ptr("mnt_parent"))
	if err != nil {
		return m, false, err
	}
	m = Mount{Addr: at, ID: t.int("mnt_id"), Parent: parent.int("mnt_id"), Dev: device(super.dev), FS: super.typ}
	options := []string{"rw"}
	if flags&0x40 != 0 { // MNT_READONLY
		options[0] = "ro"
	}
	for _, o := range mountOptions {
		if flags&o.flag != 0 {
			options = append(options, o.name)
		}
	}
	m.Options = strings.Join(options, ",")
	options = []string{"rw"}
	if super.flags&1 != 0 { // SB_RDONLY
		options[0] = "ro"
	}
	for _, o := range superOptions {
		if super.flags&o.flag != 0 {
			options = append(options, o.name)
		}
	}
	m.Super = strings.Join(options, ",")
	if p := t.ptr("mnt_devname"); p != 0 {
		if m.Source, err = w.v.cstring("mnt_devname", p, 4096); err != nil {
			return m, false, err
		}
	}
	if m.Root, err = w.within(t.ptr("mnt.mnt_root")); err != nil {
		return m, false, err
	}
	m.Path, err = w.path(t.ptr("mnt.mnt_root"), at+VirtAddr(w.vfsmount))
	return m, err == nil, err
}
