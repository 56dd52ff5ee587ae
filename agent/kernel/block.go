package kernel

import (
	"fmt"
	"iter"
	"time"
)

// Disk is a block device as a whole (struct gendisk, include/linux/blkdev.h).
type Disk struct {
	Addr      VirtAddr `json:"addr"`
	Name      string   `json:"name"`
	Dev       string   `json:"dev"`  // major:minor
	Size      uint64   `json:"size"` // bytes
	ReadOnly  bool     `json:"readOnly"`
	Queues    int      `json:"queues"` // that its driver has; zero if it takes requests otherwise
	Opened    int      `json:"opened"` // how often the whole device is open
	Reads     uint64   `json:"reads"`  // that were completed
	Writes    uint64   `json:"writes"`
	ReadBytes uint64   `json:"readBytes"`
	// WrittenBytes and ReadBytes count what was asked for, as /proc/diskstats does.
	WrittenBytes uint64    `json:"writtenBytes"`
	InFlight     []Request `json:"inFlight"`
}

// Request is a request that a driver was given and has not completed (struct request, include/linux/blk-mq.h).
type Request struct {
	Addr   VirtAddr      `json:"addr"`
	Op     string        `json:"op"`     // REQ_OP_…: read, write, flush, discard, …
	Sector uint64        `json:"sector"` // of 512 bytes
	Bytes  uint64        `json:"bytes"`
	Tag    int           `json:"tag"`
	Age    time.Duration `json:"age"` // since it was made
}

const (
	maxBlockDevices = 1 << 16
	maxHWQueues     = 1 << 12
	maxTags         = 1 << 15
	maxRequests     = 1 << 18
)

type diskWalk struct {
	v                                             *View
	device, disk, queue, ctx, tags, request, stat *shape
	part, link                                    *shape // until v5.10
	vfsInode, bdev                                uint64 // in bdev_inode
	inFlight                                      int64  // MQ_RQ_IN_FLIGHT
	ops                                           map[uint64]string
	mono                                          int64
	requests                                      int
}

// Disks lists the block devices, without their partitions, with what is under way at each.
func (v *View) Disks() iter.Seq2[Disk, error] {
	return settled(v, "walk block devices", func() ([]Disk, error) {
		w := diskWalk{v: v, ops: make(map[uint64]string)}
		if err := w.resolve(); err != nil {
			return nil, err
		}
		h, err := v.Heartbeat()
		if err != nil {
			return nil, err
		}
		w.mono = h.Mono
		if w.part != nil {
			return w.class()
		}
		var all []Disk
		err = w.devices(func(at VirtAddr) error {
			d, ok, err := w.read(at)
			if ok {
				all = append(all, d)
			}
			return err
		})
		return all, err
	})
}

// devices calls f for each struct block_device that has an inode: since v5.11 these are all.
func (w *diskWalk) devices(f func(at VirtAddr) error) error {
	r := resolver{img: w.v.img}
	super := r.symbol("blockdev_superblock")
	inodes := r.field("super_block", 16, "s_inodes")
	entry := r.field("inode", 16, "i_sb_list")
	if r.err != nil {
		return r.err
	}
	sb, err := w.v.pointer("blockdev_superblock", super)
	if err != nil {
		return err
	}
	return w.v.list("bdev_inode", sb+VirtAddr(inodes), entry, maxBlockDevices, func(at VirtAddr) error {
		return f(at - VirtAddr(w.vfsInode) + VirtAddr(w.bdev))
	})
}

// class lists the disks of a kernel until v5.10, where a disk that nobody has opened has no block_device: those of the class of block
// devices (include/linux/genhd.h).
func (w *diskWalk) class() ([]Disk, error) {
	r := resolver{img: w.v.img}
	class := r.symbol("block_class")
	private := r.field("class", 8, "p")
	devices := r.field("subsys_private", 16, "klist_devices.k_list")
	node := r.field("device_private", 16, "knode_class.n_node")
	dev, part0 := r.field("hd_struct", 0, "__dev"), r.field("gendisk", 0, "part0")
	if r.err != nil {
		return nil, r.err
	}
	opened := make(map[VirtAddr]int) // by gendisk
	err := w.devices(func(at VirtAddr) error {
		t, err := w.v.thing(w.device, at)
		if err == nil && t.num("bd_partno")&0xff == 0 {
			opened[t.ptr("bd_disk")] = t.int("bd_openers")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	p, err := w.v.pointer("block_class", class+VirtAddr(private))
	if err != nil {
		return nil, err
	}
	var all []Disk
	err = w.v.list("device_private", p+VirtAddr(devices), node, maxBlockDevices, func(at VirtAddr) error {
		l, err := w.v.thing(w.link, at)
		if err != nil {
			return err
		}
		t, err := w.v.thing(w.part, l.ptr("device")-VirtAddr(dev))
		if err != nil || t.int("partno") != 0 {
			return err
		}
		g, err := w.v.thing(w.disk, t.addr()-VirtAddr(part0))
		if err != nil {
			return err
		}
		d := Disk{Addr: g.addr(), Name: g.text("disk_name"), Dev: device(t.num("__dev.devt")), Size: t.num("nr_sects") << 9, Opened: opened[g.addr()],
			ReadOnly: t.int("policy") != 0, InFlight: []Request{}}
		err = w.fill(&d, g, t.ptr("dkstats"))
		all = append(all, d)
		return err
	})
	return all, err
}

func (w *diskWalk) resolve() error {
	r := resolver{img: w.v.img}
	w.vfsInode, w.bdev = r.field("bdev_inode", 0, "vfs_inode"), r.field("bdev_inode", 0, "bdev")
	if _, err := w.v.img.types.sizeof("hd_struct"); err == nil {
		w.part = r.shape("hd_struct", "nr_sects", "dkstats", "policy", "partno", "__dev.devt")
		w.link = r.shape("device_private", "device")
		w.device = r.shape("block_device", "bd_disk", "bd_openers", "bd_partno")
		w.disk = r.shape("gendisk", "disk_name[]", "queue")
	} else {
		w.device = r.shape("block_device", "bd_disk", "bd_nr_sectors", "bd_stats", "bd_dev", "bd_openers.counter|bd_openers", "bd_partno?", "__bd_flags.counter?", "bd_read_only?")
		w.disk = r.shape("gendisk", "disk_name[]", "part0", "queue")
	}
	w.queue = r.shape("request_queue", "hctx_table[]?", "queue_hw_ctx?", "nr_hw_queues")
	w.ctx = r.shape("blk_mq_hw_ctx", "queue_num", "tags", "queue")
	w.tags = r.shape("blk_mq_tags", "nr_tags", "rqs")
	w.request = r.shape("request", "q", "mq_hctx", "cmd_flags", "tag", "__data_len", "__sector", "start_time_ns", "state")
	w.stat = r.shape("disk_stats", "sectors[]", "ios[]")
	if r.err != nil {
		return r.err
	}
	var err error
	if w.inFlight, err = w.v.img.types.enum("mq_rq_state", "MQ_RQ_IN_FLIGHT"); err != nil {
		return fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	for _, name := range []string{"REQ_OP_READ", "REQ_OP_WRITE", "REQ_OP_FLUSH", "REQ_OP_DISCARD", "REQ_OP_SECURE_ERASE", "REQ_OP_WRITE_ZEROES",
		"REQ_OP_ZONE_OPEN", "REQ_OP_ZONE_CLOSE", "REQ_OP_ZONE_FINISH", "REQ_OP_ZONE_APPEND", "REQ_OP_ZONE_RESET", "REQ_OP_ZONE_RESET_ALL", "REQ_OP_DRV_IN", "REQ_OP_DRV_OUT"} {
		n, err := w.v.img.types.enum("req_op", name) // req_opf until v5.19
		if err != nil {
			n, err = w.v.img.types.enum("req_opf", name)
		}
		if err == nil {
			w.ops[uint64(n)] = name
		}
	}
	return nil
}

// read reads the disk of a block device; ok is false if that is none as a whole.
func (w *diskWalk) read(at VirtAddr) (d Disk, ok bool, err error) {
	t, err := w.v.thing(w.device, at)
	if err != nil {
		return d, false, err
	}
	p := t.ptr("bd_disk")
	if p == 0 {
		return d, false, nil // the root of the file system of block devices
	}
	g, err := w.v.thing(w.disk, p)
	if err != nil {
		return d, false, err
	}
	if g.ptr("part0") != t.addr() {
		return d, false, nil // a partition
	}
	d = Disk{Addr: p, Name: g.text("disk_name"), Dev: device(t.num("bd_dev")), Size: t.num("bd_nr_sectors") << 9, Opened: t.int("bd_openers.counter"), InFlight: []Request{}}
	// BD_READ_ONLY of enum-less flags since v6.10, a byte before.
	if _, ok := t.fields["__bd_flags.counter"]; ok {
		d.ReadOnly = t.num("__bd_flags.counter")&(1<<8) != 0
	} else {
		d.ReadOnly = t.num("bd_read_only")&0xff != 0
	}
	err = w.fill(&d, g, t.ptr("bd_stats"))
	return d, err == nil, err
}

// fill adds what was done and what is under way; g is the gendisk, stats are its counters of the first CPU.
func (w *diskWalk) fill(d *Disk, g thing, stats VirtAddr) error {
	if d.Name == "" || d.Size > 1<<60 {
		return g.corrupt("%q of %d bytes", d.Name, d.Size)
	}
	if stats != 0 {
		for _, offset := range w.v.img.perCPU {
			if offset == 0 {
				continue
			}
			s, err := w.v.thing(w.stat, stats+offset)
			if err != nil {
				return err
			}
			// By STAT_READ and STAT_WRITE of enum stat_group.
			ios, sectors := s.bytes("ios"), s.bytes("sectors")
			if len(ios) < 16 || len(sectors) < 16 {
				return s.corrupt("%d bytes of counters", len(ios))
			}
			d.Reads, d.Writes = d.Reads+le64(ios), d.Writes+le64(ios[8:])
			d.ReadBytes, d.WrittenBytes = d.ReadBytes+le64(sectors)<<9, d.WrittenBytes+le64(sectors[8:])<<9
		}
	}
	if p := g.ptr("queue"); p != 0 {
		return w.queued(d, p)
	}
	return nil
}

// queued lists the requests of a queue that its driver has.
func (w *diskWalk) queued(d *Disk, at VirtAddr) error {
	q, err := w.v.thing(w.queue, at)
	if err != nil {
		return err
	}
	n := q.int("nr_hw_queues")
	if n < 0 || n > maxHWQueues {
		return q.corrupt("%d hardware queues", n)
	}
	seen := make(map[VirtAddr]bool) // queues may share their tags
	hctx := func(_ uint64, at VirtAddr) error {
		d.Queues++
		c, err := w.v.thing(w.ctx, at)
		if err != nil {
			return err
		}
		if c.ptr("queue") != q.addr() {
			return c.corrupt("is of the queue at %v, not of that at %v", c.ptr("queue"), q.addr())
		}
		p := c.ptr("tags")
		if p == 0 || seen[p] {
			return nil
		}
		seen[p] = true
		return w.tagged(d, q.addr(), p)
	}
	if _, ok := q.fields["hctx_table"]; ok { // since v5.18
		return w.v.xarray("blk_mq_hw_ctx", q.at("hctx_table"), maxHWQueues, hctx)
	}
	p := q.ptr("queue_hw_ctx")
	if p == 0 || n == 0 {
		return nil
	}
	all, err := w.v.pointers("queue_hw_ctx", p, n)
	if err != nil {
		return err
	}
	for _, at := range all {
		if err := hctx(0, at); err != nil {
			return err
		}
	}
	return nil
}

// tagged lists the requests that have one of a set of tags, as blk_mq_tagset_busy_iter does.
func (w *diskWalk) tagged(d *Disk, queue, at VirtAddr) error {
	t, err := w.v.thing(w.tags, at)
	if err != nil {
		return err
	}
	n := t.num("nr_tags")
	if n > maxTags {
		return t.corrupt("%d tags", n)
	}
	requests, err := w.v.pointers("blk_mq_tags", t.ptr("rqs"), int(n))
	if err != nil {
		return err
	}
	for tag, p := range requests {
		if p == 0 {
			continue
		}
		r, err := w.v.thing(w.request, p)
		if err != nil {
			return err
		}
		if int64(r.num("state")) != w.inFlight || r.ptr("q") != queue || r.int("tag") != tag {
			continue // it is done, or another's
		}
		if w.requests++; w.requests > maxRequests {
			return t.corrupt("more than %d requests", maxRequests)
		}
		// The operation is in the lowest 8 bits: REQ_OP_BITS of include/linux/blk_types.h.
		op := r.num("cmd_flags") & 0xff
		name := fmt.Sprint(op)
		if w.ops[op] != "" {
			name = lowerName(w.ops[op], "REQ_OP_")
		}
		d.InFlight = append(d.InFlight, Request{Addr: p, Op: name, Sector: r.num("__sector"), Bytes: r.num("__data_len") & 0xffffffff, Tag: tag,
			Age: max(0, time.Duration(w.mono-int64(r.num("start_time_ns"))))})
	}
	return nil
}
