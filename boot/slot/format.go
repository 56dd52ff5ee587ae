package slot

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf16"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/u-root/u-root/pkg/mount/gpt"
)

// PartitionAgent is the name of the partition with the agent's file system (package boot finds it by the file system's label).
const PartitionAgent = "backdoor-state"

// A Layout says how large the partitions of a GPT disk are, in bytes. All are rounded up to whole MiB.
type Layout struct {
	Slot     int64 // each of A, B and the recovery image
	NoGolden bool  // without a recovery image
	Agent    int64 // the agent's file system; 0 leaves it out
}

const mib = 1 << 20

// A Partition is one partition of a disk.
type Partition struct {
	Name      string
	Off, Size int64 // bytes
}

func wholeMiB(n int64) int64 { return (n + mib - 1) / mib * mib }

// Partitions returns the partitions in their order on the disk.
func (l Layout) Partitions() []Partition {
	off := int64(mib)
	var all []Partition
	add := func(name string, size int64) {
		all = append(all, Partition{name, off, wholeMiB(size)})
		off += wholeMiB(size)
	}
	add(PartitionState, mib)
	add(PartitionA, l.Slot)
	add(PartitionB, l.Slot)
	if !l.NoGolden {
		add(PartitionGolden, l.Slot)
	}
	if l.Agent > 0 {
		add(PartitionAgent, l.Agent)
	}
	return all
}

// Size is the smallest disk for the layout, in bytes.
func (l Layout) Size() int64 {
	all := l.Partitions()
	last := all[len(all)-1]
	return last.Off + last.Size + mib
}

// linuxData is the type of all partitions (Linux filesystem data, 0FC63DAF-8483-4772-8E79-3D69D8477DE4).
var linuxData = gpt.GUID{L: 0x0fc63daf, W1: 0x8483, W2: 0x4772, B: [8]byte{0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4}}

// Format writes a partition table and an empty state: everything that was on the disk is lost.
func Format(d Device, l Layout) (*Disk, error) {
	if l.Slot < mib {
		return nil, fmt.Errorf("format: a slot of %d bytes is too small", l.Slot)
	}
	if d.Size() < l.Size() {
		return nil, fmt.Errorf("format: the disk has %d bytes and the layout needs %d", d.Size(), l.Size())
	}
	blocks := uint64(d.Size() / gpt.BlockSize)
	guid := func() (g gpt.GUID) {
		var b [16]byte
		_, _ = rand.Read(b[:]) // never fails
		g.L, g.W1, g.W2 = binary.LittleEndian.Uint32(b[:]), binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:])&0x0fff|0x4000
		copy(g.B[:], b[8:])
		g.B[0] = g.B[0]&0x3f | 0x80
		return g
	}
	const entries = gpt.MaxNPart * 128 / gpt.BlockSize
	head := gpt.Header{
		Signature: gpt.Signature, Revision: gpt.Revision, HeaderSize: gpt.HeaderSize, CurrentLBA: 1, BackupLBA: blocks - 1,
		FirstLBA: 2 + entries, LastLBA: blocks - 2 - entries, DiskGUID: guid(), PartStart: 2, NPart: gpt.MaxNPart, PartSize: 128,
	}
	backup := head
	backup.CurrentLBA, backup.BackupLBA, backup.PartStart = blocks-1, 1, blocks-1-entries
	parts := make([]gpt.Part, gpt.MaxNPart)
	for i, p := range l.Partitions() {
		parts[i] = gpt.Part{PartGUID: linuxData, UniqueGUID: guid(), FirstLBA: uint64(p.Off / gpt.BlockSize), LastLBA: uint64((p.Off+p.Size)/gpt.BlockSize - 1)}
		for j, c := range utf16.Encode([]rune(p.Name)) {
			binary.LittleEndian.PutUint16(parts[i].Name[2*j:], c)
		}
	}
	var mbr gpt.MBR // a protective one (UEFI specification 2.10, section 5.2.3)
	mbr[446+4], mbr[510], mbr[511] = 0xee, 0x55, 0xaa
	copy(mbr[446+1:], []byte{0, 2, 0})
	copy(mbr[446+5:], []byte{0xff, 0xff, 0xff})
	binary.LittleEndian.PutUint32(mbr[446+8:], 1)
	binary.LittleEndian.PutUint32(mbr[446+12:], uint32(min(blocks-1, 0xffffffff)))
	// The state first: where the table is, there is one.
	p := l.Partitions()
	zero := make([]byte, copySize)
	for _, at := range []int64{0, mib / 2} {
		if _, err := d.WriteAt(zero, p[0].Off+at); err != nil {
			return nil, fmt.Errorf("format: %w", err)
		}
	}
	for _, part := range p[1:] { // no image of before, no file system of before
		if _, err := d.WriteAt(zero, part.Off); err != nil {
			return nil, fmt.Errorf("format: %w", err)
		}
	}
	if err := gpt.Write(d, &gpt.PartitionTable{MasterBootRecord: &mbr, Primary: &gpt.GPT{Header: head, Parts: parts}, Backup: &gpt.GPT{Header: backup, Parts: parts}}); err != nil {
		return nil, fmt.Errorf("format: %w", err)
	}
	if err := d.Sync(); err != nil {
		return nil, fmt.Errorf("format: %w", err)
	}
	return OpenGPT(d)
}

// ReadPartitions reads a disk's partition table: the first copy, or the one at the disk's end if that is damaged.
func ReadPartitions(d Device) ([]Partition, error) {
	table, err := readTable(d, gpt.BlockSize)
	if err != nil {
		backup, berr := readTable(d, (d.Size()/gpt.BlockSize-1)*gpt.BlockSize)
		if berr != nil {
			return nil, fmt.Errorf("read the partition table: %w", errors.Join(err, berr))
		}
		table = backup
	}
	var all []Partition
	for i, p := range table.Parts {
		if p.PartGUID == (gpt.GUID{}) {
			continue
		}
		last := uint64(d.Size()/gpt.BlockSize) - 1
		if p.FirstLBA < 2 || p.LastLBA < p.FirstLBA || p.LastLBA > last {
			return nil, fmt.Errorf("read the partition table: partition %d is from block %d to %d, and the disk has %d", i+1, p.FirstLBA, p.LastLBA, last+1)
		}
		var name []uint16
		for j := 0; j < len(p.Name); j += 2 {
			if c := binary.LittleEndian.Uint16(p.Name[j:]); c != 0 {
				name = append(name, c)
			}
		}
		all = append(all, Partition{string(utf16.Decode(name)), int64(p.FirstLBA) * gpt.BlockSize, int64(p.LastLBA-p.FirstLBA+1) * gpt.BlockSize})
	}
	return all, nil
}

// readTable reads one copy. u-root's reader believes the sizes in the header, so they are looked at first.
func readTable(d Device, off int64) (*gpt.GPT, error) {
	var head [gpt.HeaderSize]byte
	if off < gpt.BlockSize {
		return nil, errors.New("the disk is too small for one")
	}
	if _, err := d.ReadAt(head[:], off); err != nil {
		return nil, err
	}
	n, size := binary.LittleEndian.Uint32(head[80:]), binary.LittleEndian.Uint32(head[84:])
	start := binary.LittleEndian.Uint64(head[72:])
	if n > gpt.MaxNPart || size != 128 || start > uint64(d.Size()/gpt.BlockSize) {
		return nil, fmt.Errorf("there is none: %d entries of %d bytes at block %d", n, size, start)
	}
	g, err := gpt.Table(d, off)
	if err != nil {
		return nil, errors.New(strings.ToValidUTF8(clip(err.Error()), "?")) // it can be very long
	}
	return g, nil
}

// OpenGPT opens the slots of a disk, or of a file that is the image of one, by its partition table. A machine's own are found by [Find].
func OpenGPT(d Device) (*Disk, error) {
	all, err := ReadPartitions(d)
	if err != nil {
		return nil, err
	}
	var found parts
	for _, p := range all {
		at := map[string]*Device{PartitionState: &found.state, PartitionA: &found.a, PartitionB: &found.b, PartitionGolden: &found.golden}[p.Name]
		if at == nil {
			continue
		}
		if *at != nil {
			return nil, fmt.Errorf("two partitions are named %s", p.Name)
		}
		*at = Section(d, p.Off, p.Size)
	}
	if found.state == nil {
		return nil, ErrNone
	}
	return Open(found.state, found.a, found.b, found.golden)
}

// Provision puts the first image on a disk: in slot A, to prove itself there, and as the recovery image.
func (d *Disk) Provision(in io.Reader, p bundle.Policy, now time.Time) error {
	if p.MaxSize == 0 || p.MaxSize > d.slots[A].Size() {
		p.MaxSize = d.slots[A].Size()
	}
	r, err := bundle.NewReader(in, p)
	if err != nil {
		return err
	}
	if s := d.State(); s.Active != "" || s.A.Status == Good || s.B.Status == Good {
		return errors.New("the disk has an image that runs: update it instead")
	}
	u, err := d.Begin("", &r.Head, 0)
	if err != nil {
		return err
	}
	if _, err := io.Copy(u, r); err != nil {
		return errors.Join(err, u.Abort(err, false))
	}
	if err := u.Commit(p, false, now); err != nil {
		return err
	}
	if to := d.slots[Golden]; to != nil {
		return d.copyGolden(to, u.to, now.UTC().Truncate(time.Second), p)
	}
	return nil
}
