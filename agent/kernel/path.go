package kernel

import (
	"fmt"
	"strings"
)

// pathWalk finds the names of what the virtual file system holds (include/linux/dcache.h, fs/mount.h).
type pathWalk struct {
	v                                  *View
	dentry, mount, inode, super, fsTyp *shape
	vfsmount                           uint64 // in mount

	mounts map[VirtAddr]thing
	supers map[VirtAddr]superBlock
}

// superBlock is a file system that is mounted.
type superBlock struct {
	addr  VirtAddr
	typ   string // with its subtype: fuse.sshfs
	dev   uint64 // major<<20 | minor
	flags uint64 // SB_…
}

const (
	maxDepth = 2048 // names in a path: PATH_MAX / 2
	nameMax  = 255
)

func (v *View) pathWalk() (*pathWalk, error) {
	r := resolver{img: v.img}
	w := &pathWalk{v: v, mounts: make(map[VirtAddr]thing), supers: make(map[VirtAddr]superBlock)}
	w.dentry = r.shape("dentry", "d_parent", "d_name.name", "d_name.len", "d_inode", "d_hash.pprev", "d_sb")
	w.mount = r.shape("mount", "mnt_parent", "mnt_mountpoint", "mnt.mnt_root", "mnt.mnt_sb", "mnt.mnt_flags", "mnt_id", "mnt_devname")
	w.vfsmount = r.field("mount", 0, "mnt")
	w.inode = r.shape("inode", "i_ino", "i_mode", "i_rdev", "i_size", "i_sb")
	w.super = r.shape("super_block", "s_dev", "s_flags", "s_type", "s_subtype?")
	w.fsTyp = r.shape("file_system_type", "name")
	return w, r.err
}

// of reads the mount that a vfsmount is part of.
func (w *pathWalk) of(vfsmount VirtAddr) (thing, error) {
	return w.at(vfsmount - VirtAddr(w.vfsmount))
}

func (w *pathWalk) at(mount VirtAddr) (thing, error) {
	if m, ok := w.mounts[mount]; ok {
		return m, nil
	}
	m, err := w.v.thing(w.mount, mount)
	if err == nil {
		w.mounts[mount] = m
	}
	return m, err
}

func (w *pathWalk) superBlock(at VirtAddr) (superBlock, error) {
	if s, ok := w.supers[at]; ok {
		return s, nil
	}
	t, err := w.v.thing(w.super, at)
	if err != nil {
		return superBlock{}, err
	}
	typ, err := w.v.thing(w.fsTyp, t.ptr("s_type"))
	if err != nil {
		return superBlock{}, err
	}
	s := superBlock{addr: at, dev: t.num("s_dev"), flags: t.num("s_flags")}
	if s.typ, err = w.v.cstring("file_system_type", typ.ptr("name"), 256); err != nil {
		return s, err
	}
	if p := t.ptr("s_subtype"); p != 0 {
		sub, err := w.v.cstring("super_block", p, 256)
		if err != nil {
			return s, err
		}
		s.typ += "." + sub
	}
	w.supers[at] = s
	return s, nil
}

func (w *pathWalk) name(d *thing) (string, error) {
	n := d.num("d_name.len")
	if n > nameMax {
		return "", d.corrupt("name of %d bytes", n)
	}
	b := make([]byte, n)
	if n > 0 {
		p := d.ptr("d_name.name")
		if !w.v.img.space.valid(p, 1) {
			return "", d.corrupt("name at %v", p)
		}
		if err := w.v.img.space.object(w.v, "dentry name", p, b); err != nil {
			return "", err
		}
	}
	return printable(b), nil
}

// path returns the path of a dentry from the root of its mount namespace on, as d_path of fs/d_path.c does. Of what is in
// no tree, it is the name alone.
func (w *pathWalk) path(dentry, vfsmount VirtAddr) (string, error) {
	mount, err := w.of(vfsmount)
	if err != nil {
		return "", err
	}
	var names []string
	first := true
	suffix := ""
	at := dentry
	for range maxDepth {
		if err := w.v.ctx.Err(); err != nil {
			return "", err
		}
		if at == mount.ptr("mnt.mnt_root") {
			parent := mount.ptr("mnt_parent")
			if parent == mount.addr() {
				return joined(names) + suffix, nil
			}
			at = mount.ptr("mnt_mountpoint")
			if mount, err = w.at(parent); err != nil {
				return "", err
			}
			first = false
			continue
		}
		d, err := w.v.thing(w.dentry, at)
		if err != nil {
			return "", err
		}
		name, err := w.name(&d)
		if err != nil {
			return "", err
		}
		parent := d.ptr("d_parent")
		if parent == at {
			return joined(append(names, name)) + " (deleted)", nil // in no tree
		}
		if first && d.num("d_hash.pprev") == 0 {
			suffix = " (deleted)"
		}
		first = false
		names = append(names, name)
		at = parent
	}
	return "", &CorruptError{"dentry", dentry, fmt.Sprintf("path of more than %d names", maxDepth)}
}

// within returns the path of a dentry from the root of its file system on.
func (w *pathWalk) within(dentry VirtAddr) (string, error) {
	var names []string
	for at := dentry; len(names) < maxDepth; {
		d, err := w.v.thing(w.dentry, at)
		if err != nil {
			return "", err
		}
		parent := d.ptr("d_parent")
		if parent == at {
			return joined(names), nil
		}
		name, err := w.name(&d)
		if err != nil {
			return "", err
		}
		names = append(names, name)
		at = parent
	}
	return "", &CorruptError{"dentry", dentry, fmt.Sprintf("path of more than %d names", maxDepth)}
}

// joined makes a path of names, the last first.
func joined(names []string) string {
	if len(names) == 0 {
		return "/"
	}
	var b strings.Builder
	for i := len(names) - 1; i >= 0; i-- {
		b.WriteByte('/')
		b.WriteString(names[i])
	}
	return b.String()
}
