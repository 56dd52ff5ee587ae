package kernel

import (
	"iter"
)

// Pipe is a pipe or FIFO that a process has open (struct pipe_inode_info, include/linux/pipe_fs_i.h).
type Pipe struct {
	Addr    VirtAddr      `json:"addr"`
	Inode   uint64        `json:"inode"`
	Path    string        `json:"path"`
	Bytes   uint64        `json:"bytes"` // that wait to be read
	Used    int           `json:"used"`  // of its buffers
	Buffers int           `json:"buffers"`
	Readers int           `json:"readers"` // open files that read
	Writers int           `json:"writers"`
	Owners  []SocketOwner `json:"owners"` // the processes that have it open
}

const maxPipeBuffers = 1 << 20

// Pipes lists the pipes that processes have open.
func (v *View) Pipes() iter.Seq2[Pipe, error] {
	return settled(v, "walk pipes", func() ([]Pipe, error) {
		r := resolver{img: v.img}
		file := r.shape("file", "f_inode")
		inode := r.shape("inode", "i_pipe")
		// head and tail wrap around; they are 16 bits wide since v6.14.
		pipe := r.shape("pipe_inode_info", "head", "tail", "ring_size", "readers", "writers", "bufs")
		buffer := r.shape("pipe_buffer", "len")
		size := r.size("pipe_buffer")
		if r.err != nil {
			return nil, r.err
		}
		var all []Pipe
		known := make(map[VirtAddr]int)
		for f, err := range v.OpenFiles(0) {
			if err != nil {
				return all, err
			}
			if f.Kind != "fifo" || f.Addr == 0 {
				continue
			}
			x, err := v.thing(file, f.Addr)
			if err != nil {
				return all, err
			}
			i, err := v.thing(inode, x.ptr("f_inode"))
			if err != nil {
				return all, err
			}
			at := i.ptr("i_pipe")
			if at == 0 {
				continue
			}
			owner := SocketOwner{f.PID, f.Comm, f.FD}
			if n, ok := known[at]; ok {
				all[n].Owners = append(all[n].Owners, owner)
				continue
			}
			t, err := v.thing(pipe, at)
			if err != nil {
				return all, err
			}
			width := 8 * t.fields["head"].Size
			ring, used := t.num("ring_size"), (t.num("head")-t.num("tail"))<<(64-width)>>(64-width)
			if ring == 0 || ring&(ring-1) != 0 || ring > maxPipeBuffers || used > ring {
				return all, t.corrupt("%d of %d buffers in use", used, ring)
			}
			p := Pipe{Addr: at, Inode: f.Inode, Path: f.Path, Used: int(used), Buffers: int(ring), Readers: t.int("readers"), Writers: t.int("writers"), Owners: []SocketOwner{owner}}
			for n := range used {
				b, err := v.thing(buffer, t.ptr("bufs")+VirtAddr((t.num("tail")+n)&(ring-1)*size))
				if err != nil {
					return all, err
				}
				if b.num("len") > 1<<31 {
					return all, b.corrupt("%d bytes", b.num("len"))
				}
				p.Bytes += b.num("len")
			}
			known[at] = len(all)
			all = append(all, p)
		}
		return all, nil
	})
}
