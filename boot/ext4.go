package boot

import (
	"encoding/binary"
	"errors"
	"io"
	"strings"
)

// errNoExt4 says that a device holds no ext2, ext3 or ext4 file system.
var errNoExt4 = errors.New("no ext4 superblock")

const (
	superblockOffset = 1024
	superblockSize   = 1024
)

// An ext4Super is what is needed of struct ext4_super_block (fs/ext4/ext4.h, Linux 6.1; all little endian).
type ext4Super struct {
	label string // s_volume_name
}

// readExt4 reads the superblock of a block device. The error is errNoExt4 if the device has none.
func readExt4(dev io.ReaderAt) (ext4Super, error) {
	b := make([]byte, superblockSize)
	if n, err := dev.ReadAt(b, superblockOffset); n < len(b) {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return ext4Super{}, errNoExt4 // too small to hold one
		}
		return ext4Super{}, err
	}
	return parseExt4(b)
}

func parseExt4(b []byte) (ext4Super, error) {
	const (
		magicAt  = 0x38 // s_magic, EXT4_SUPER_MAGIC
		magic    = 0xef53
		labelAt  = 0x78 // s_volume_name[EXT4_LABEL_MAX]
		labelLen = 16
	)
	if len(b) < labelAt+labelLen || binary.LittleEndian.Uint16(b[magicAt:]) != magic {
		return ext4Super{}, errNoExt4
	}
	label, _, _ := strings.Cut(string(b[labelAt:labelAt+labelLen]), "\x00")
	return ext4Super{label: label}, nil
}
