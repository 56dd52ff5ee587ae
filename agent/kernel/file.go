package kernel

import (
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"strconv"
)

// OpenFile is a file that a process has open, or uses otherwise (struct file, include/linux/fs.h).
type OpenFile struct {
	PID   int      `json:"pid"`  // of the process
	Comm  string   `json:"comm"` // its name
	FD    string   `json:"fd"`   // descriptor; or cwd, root, exe
	Addr  VirtAddr `json:"addr"` // of struct file; zero of cwd and root
	Kind  string   `json:"kind"` // file, dir, char, block, fifo, socket, link or anon
	Path  string   `json:"path"` // as /proc/PID/fd shows it
	FS    string   `json:"fs"`   // type of its file system
	Inode uint64   `json:"inode"`
	Size  int64    `json:"size"`
	Pos   int64    `json:"pos"`
	Flags uint64   `json:"flags"`            // O_…
	Dev   string   `json:"dev,omitempty"`    // major:minor of a device
	Sock  VirtAddr `json:"socket,omitempty"` // struct sock; see Sockets
}

const (
	maxFDs   = 1 << 21
	maxFiles = 1 << 20 // that a listing has
)

// fileKinds are the types of i_mode, by S_IFMT >> 12.
var fileKinds = [16]string{0: "anon", 1: "fifo", 2: "char", 4: "dir", 6: "block", 8: "file", 10: "link", 12: "socket"}

type fileWalk struct {
	v                                *View
	paths                            *pathWalk
	task, files, table, file, mm, fs *shape
	socket                           *shape
	socketInode                      uint64 // in socket_alloc
	socketIn                         uint64
	all                              []OpenFile
	err                              error // the first process that could not be read
}

// OpenFiles lists the open files of a process, or of all if pid is zero: its working directory, root and program, then its
// descriptors. A process that cannot be read does not end the list: the error comes last.
func (v *View) OpenFiles(pid int) iter.Seq2[OpenFile, error] {
	return settled(v, "walk open files", func() ([]OpenFile, error) {
		w := fileWalk{v: v}
		if err := w.resolve(); err != nil {
			return nil, err
		}
		found := pid == 0
		tables := make(map[VirtAddr]bool)
		for t, err := range v.Tasks() {
			if err != nil {
				return w.all, err
			}
			if pid != 0 && t.TGID != pid {
				continue
			}
			found = true
			if err := w.process(t, tables); err != nil {
				var corrupt *CorruptError
				if !errors.As(err, &corrupt) {
					return w.all, err
				}
				if w.err == nil {
					w.err = fmt.Errorf("PID %d: %w", t.PID, err)
				}
			}
		}
		if !found {
			return nil, fmt.Errorf("process %d: %w", pid, ErrNotFound)
		}
		return w.all, w.err
	})
}

func (w *fileWalk) resolve() (err error) {
	if w.paths, err = w.v.pathWalk(); err != nil {
		return err
	}
	r := resolver{img: w.v.img}
	w.task = r.shape("task_struct", "files", "fs", "mm")
	w.files = r.shape("files_struct", "fdt")
	w.table = r.shape("fdtable", "max_fds", "fd", "open_fds")
	w.file = r.shape("file", "f_path.dentry", "f_path.mnt", "f_inode", "f_flags", "f_pos")
	w.mm = r.shape("mm_struct", "exe_file")
	w.fs = r.shape("fs_struct", "pwd.dentry", "pwd.mnt", "root.dentry", "root.mnt")
	w.socketInode = r.field("socket_alloc", 0, "vfs_inode")
	w.socketIn = r.field("socket_alloc", 0, "socket")
	w.socket = r.shape("socket", "sk")
	return r.err
}

// process lists the files of a task, unless another of its threads had the same.
func (w *fileWalk) process(t Task, seen map[VirtAddr]bool) error {
	task, err := w.v.thing(w.task, t.Addr)
	if err != nil {
		return err
	}
	base := OpenFile{PID: t.TGID, Comm: t.Comm}
	if p := task.ptr("fs"); p != 0 && t.PID == t.TGID {
		fs, err := w.v.thing(w.fs, p)
		if err != nil {
			return err
		}
		for _, name := range []string{"cwd", "root"} {
			field := map[string]string{"cwd": "pwd", "root": "root"}[name]
			f := base
			f.FD = name
			if err := w.describe(&f, fs.ptr(field+".dentry"), fs.ptr(field+".mnt"), 0); err != nil {
				return err
			}
			w.all = append(w.all, f)
		}
	}
	if p := task.ptr("mm"); p != 0 && t.PID == t.TGID {
		mm, err := w.v.thing(w.mm, p)
		if err != nil {
			return err
		}
		if exe := mm.ptr("exe_file"); exe != 0 {
			if err := w.open(base, "exe", exe); err != nil {
				return err
			}
		}
	}
	p := task.ptr("files")
	if p == 0 || seen[p] {
		return nil
	}
	seen[p] = true
	files, err := w.v.thing(w.files, p)
	if err != nil {
		return err
	}
	table, err := w.v.thing(w.table, files.ptr("fdt"))
	if err != nil {
		return err
	}
	n, fds, open := table.num("max_fds"), table.ptr("fd"), table.ptr("open_fds")
	if n > maxFDs || n%64 != 0 {
		return table.corrupt("%d descriptors", n)
	}
	words, err := w.v.pointers("open_fds", open, int(n/64))
	if err != nil {
		return err
	}
	for i, word := range words {
		for ; word != 0; word &= word - 1 {
			fd := 64*i + bits.TrailingZeros64(uint64(word))
			file, err := w.v.pointer("fdtable", fds+VirtAddr(8*fd))
			if err != nil {
				return err
			}
			if file == 0 {
				continue // reserved: its open is under way
			}
			if len(w.all) == maxFiles {
				return table.corrupt("more than %d open files", maxFiles)
			}
			if err := w.open(base, strconv.Itoa(fd), file); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *fileWalk) open(base OpenFile, fd string, at VirtAddr) error {
	t, err := w.v.thing(w.file, at)
	if err != nil {
		return err
	}
	f := base
	f.FD, f.Addr, f.Flags, f.Pos = fd, at, t.num("f_flags"), int64(t.num("f_pos"))
	if err := w.describe(&f, t.ptr("f_path.dentry"), t.ptr("f_path.mnt"), t.ptr("f_inode")); err != nil {
		return err
	}
	w.all = append(w.all, f)
	return nil
}

// describe says what a dentry and its inode are; without an inode, that of the dentry is taken.
func (w *fileWalk) describe(f *OpenFile, dentry, vfsmount, inode VirtAddr) error {
	d, err := w.v.thing(w.paths.dentry, dentry)
	if err != nil {
		return err
	}
	if inode == 0 {
		inode = d.ptr("d_inode")
	}
	i, err := w.v.thing(w.paths.inode, inode)
	if err != nil {
		return err
	}
	mode := i.num("i_mode") >> 12
	if f.Kind = fileKinds[mode&15]; f.Kind == "" {
		return i.corrupt("mode %#o", i.num("i_mode"))
	}
	f.Inode, f.Size = i.num("i_ino"), int64(i.num("i_size"))
	if rdev := i.num("i_rdev"); f.Kind == "char" || f.Kind == "block" {
		f.Dev = device(rdev)
	}
	super, err := w.paths.superBlock(i.ptr("i_sb"))
	if err != nil {
		return err
	}
	f.FS = super.typ
	// File systems whose files have made-up names: their d_dname.
	switch f.FS {
	case "sockfs":
		f.Path = fmt.Sprintf("socket:[%d]", f.Inode)
		sock, err := w.v.thing(w.socket, inode-VirtAddr(w.socketInode)+VirtAddr(w.socketIn))
		f.Sock = sock.ptr("sk")
		return err
	case "pipefs":
		f.Path = fmt.Sprintf("pipe:[%d]", f.Inode)
		return nil
	case "nsfs":
		f.Path = fmt.Sprintf("ns:[%d]", f.Inode)
		return nil
	case "pidfs": // since v6.9; its files go by their former name
		f.Kind, f.Path = "anon", "anon_inode:[pidfd]"
		return nil
	case "anon_inodefs":
		name, err := w.paths.name(&d)
		f.Kind, f.Path = "anon", "anon_inode:"+name
		return err
	}
	f.Path, err = w.paths.path(dentry, vfsmount)
	return err
}

// device writes a dev_t: MAJOR and MINOR of include/linux/kdev_t.h.
func device(dev uint64) string { return fmt.Sprintf("%d:%d", dev>>20&0xfff, dev&0xfffff) }
