// Package export puts images into the forms that vendors' own flashers take.
//
// Both were written from the formats' descriptions and read back by other programs; neither was tried on hardware.
package export

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
)

// The images of a BlueField boot stream that are made here, by their numbers.
const (
	bfbDescription = 57
	bfbPath        = 58
	bfbArguments   = 59
	bfbKernel      = 62
	bfbInitramfs   = 63
)

// bfbOrder is the order in which boot ROM, ATF and UEFI read the images of a stream.
var bfbOrder = []int{
	36, 37, 31, 30, 6, 1, 29, 38, 32, 33, 34, 35, 8, 12, 2, 7, 9, 13, 3, 39, 10, 14, 4, 11, 15, 5, // for PSC and ATF
	52, 55, 56, bfbDescription, bfbPath, bfbArguments, 60, 61, 54, bfbKernel, bfbInitramfs, // for UEFI
}

const (
	bfbMagic  = 0x13026642
	bfbHeader = 24
)

// bfbImage is one image of a stream.
type bfbImage struct {
	id, version int
	content     bundle.Content
	crc         uint32 // of the content and its padding
}

func bfbPadded(n int64) int64 { return (n + 7) &^ 7 }

// readBFB lists the images of a stream and checks their sums.
//
// Each has a header of three little-endian words of 64 bits and is padded to 8 bytes: 0 magic (32 bits), major and minor version (4 each), 4
// reserved, next and own image version (4 each), header length in words (4), image number (8); 1 length (32), CRC-32 of image and padding
// (32); 2 a bit for each number that still follows.
func readBFB(c bundle.Content) (all []bfbImage, err error) {
	for off := int64(0); off < c.Size; {
		var h [bfbHeader]byte
		if _, err := c.From.ReadAt(h[:], off); err != nil {
			return nil, fmt.Errorf("boot stream: header at byte %d: %w", off, err)
		}
		w0, n := binary.LittleEndian.Uint64(h[:]), int64(binary.LittleEndian.Uint32(h[8:]))
		if uint32(w0) != bfbMagic || w0>>32&0xf != 1 || w0>>52&0xf != bfbHeader/8 {
			return nil, fmt.Errorf("boot stream: no header of version 1 at byte %d", off)
		}
		img := bfbImage{id: int(w0 >> 56), version: int(w0 >> 48 & 0xf), crc: binary.LittleEndian.Uint32(h[12:])}
		if !slices.Contains(bfbOrder, img.id) {
			return nil, fmt.Errorf("boot stream: image number %d is not known", img.id)
		}
		if off += bfbHeader; bfbPadded(n) > c.Size-off {
			return nil, fmt.Errorf("boot stream: image %d at byte %d is cut off", img.id, off)
		}
		img.content = bundle.Content{From: io.NewSectionReader(c.From, off, n), Size: n}
		got, err := bfbSum(img.content)
		if err != nil {
			return nil, err
		}
		if got != img.crc {
			return nil, fmt.Errorf("boot stream: image %d at byte %d is damaged", img.id, off)
		}
		all = append(all, img)
		if off += bfbPadded(n); len(all) > 256 {
			return nil, errors.New("boot stream: more than 256 images")
		}
	}
	return all, nil
}

func bfbSum(c bundle.Content) (uint32, error) {
	sum := crc32.NewIEEE()
	if _, err := io.Copy(sum, io.NewSectionReader(c.From, 0, c.Size)); err != nil {
		return 0, err
	}
	_, _ = sum.Write(make([]byte, bfbPadded(c.Size)-c.Size)) // never fails
	return sum.Sum32(), nil
}

// BFB writes a BlueField boot stream (BFB) that starts a bundle's kernel with its initramfs: what bfb-install and a BlueField's BMC take. base is
// NVIDIA's own stream for the card (default.bfb), with the firmware that has to come before; its kernel, if it has one, is replaced.
func BFB(w io.Writer, base bundle.Content, img *bundle.Image, parts []bundle.Content) error {
	all, err := readBFB(base)
	if err != nil {
		return err
	}
	text := func(id int, s string) bfbImage {
		return bfbImage{id: id, content: bundle.Content{From: strings.NewReader(s), Size: int64(len(s))}}
	}
	made := []bfbImage{
		text(bfbDescription, "Backdoor "+img.Manifest.Version), text(bfbPath, "VenHw(F019E406-8C9C-11E5-8797-001ACA00BFC4)/Image"),
		text(bfbArguments, strings.TrimSpace(img.Manifest.CommandLine+" initrd=initramfs")),
	}
	for _, p := range parts {
		switch p.Name {
		case bundle.PartKernel:
			// An uncompressed arm64 Image (Documentation/arch/arm64/booting.rst): UEFI takes no other.
			var magic [4]byte
			if _, err := p.From.ReadAt(magic[:], 56); err != nil || string(magic[:]) != "ARMd" {
				return errors.New("boot stream: the kernel is no uncompressed arm64 Image")
			}
			made = append(made, bfbImage{id: bfbKernel, content: p})
		case bundle.PartInitramfs:
			made = append(made, bfbImage{id: bfbInitramfs, content: p})
		}
	}
	for i := range made {
		if made[i].crc, err = bfbSum(made[i].content); err != nil {
			return err
		}
	}
	all = slices.DeleteFunc(all, func(b bfbImage) bool {
		return slices.ContainsFunc(made, func(m bfbImage) bool { return m.id == b.id })
	})
	all = append(all, made...)
	slices.SortStableFunc(all, func(a, b bfbImage) int {
		return cmp.Or(cmp.Compare(slices.Index(bfbOrder, a.id), slices.Index(bfbOrder, b.id)), cmp.Compare(a.version, b.version))
	})
	var follow uint64
	for _, b := range all {
		follow |= 1 << b.id
	}
	for i, b := range all {
		next := 0
		if i+1 < len(all) && all[i+1].id == b.id {
			next = all[i+1].version
		} else {
			follow &^= 1 << b.id
		}
		if b.content.Size > 1<<32-1 {
			return fmt.Errorf("boot stream: image %d has %d bytes", b.id, b.content.Size)
		}
		var h [bfbHeader]byte
		binary.LittleEndian.PutUint64(h[:], bfbMagic|1<<32|2<<36|uint64(next)<<44|uint64(b.version)<<48|bfbHeader/8<<52|uint64(b.id)<<56)
		binary.LittleEndian.PutUint64(h[8:], uint64(b.content.Size)|uint64(b.crc)<<32)
		binary.LittleEndian.PutUint64(h[16:], follow)
		if _, err := w.Write(h[:]); err != nil {
			return err
		}
		if _, err := io.Copy(w, io.NewSectionReader(b.content.From, 0, b.content.Size)); err != nil {
			return err
		}
		if _, err := w.Write(make([]byte, bfbPadded(b.content.Size)-b.content.Size)); err != nil {
			return err
		}
	}
	return nil
}

// OpenBMC writes the tarball that an OpenBMC with a static flash layout takes (phosphor-software-manager): the image of its whole flash with a MANIFEST,
// each signed with RSA and SHA-256. machine is what the running OpenBMC calls itself (OPENBMC_TARGET_MACHINE). key has to be the one whose public half
// that OpenBMC holds.
func OpenBMC(w io.Writer, flash bundle.Content, machine, version string, made time.Time, key *rsa.PrivateKey) error {
	if strings.ContainsAny(machine+version, "\n\r=") || machine == "" || version == "" {
		return fmt.Errorf("tarball: machine %q, version %q", machine, version)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	manifest := []byte("purpose=xyz.openbmc_project.Software.Version.VersionPurpose.BMC\nversion=" + version + "\nKeyType=OpenBMC\nHashType=RSA-SHA256\nMachineName=" + machine + "\n")
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	out := tar.NewWriter(w)
	for _, f := range []bundle.Content{
		{Name: "image-bmc", From: flash.From, Size: flash.Size}, {Name: "MANIFEST", From: bytes.NewReader(manifest), Size: int64(len(manifest))},
		{Name: "publickey", From: bytes.NewReader(public), Size: int64(len(public))},
	} {
		sum := sha256.New()
		if _, err := io.Copy(sum, io.NewSectionReader(f.From, 0, f.Size)); err != nil {
			return fmt.Errorf("tarball: %s: %w", f.Name, err)
		}
		sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum.Sum(nil))
		if err != nil {
			return fmt.Errorf("tarball: sign %s: %w", f.Name, err)
		}
		for _, one := range []bundle.Content{f, {Name: f.Name + ".sig", From: bytes.NewReader(sig), Size: int64(len(sig))}} {
			if err := out.WriteHeader(&tar.Header{Name: one.Name, Mode: 0o644, Size: one.Size, ModTime: made, Format: tar.FormatUSTAR}); err != nil {
				return fmt.Errorf("tarball: %w", err)
			}
			if _, err := io.Copy(out, io.NewSectionReader(one.From, 0, one.Size)); err != nil {
				return fmt.Errorf("tarball: %s: %w", one.Name, err)
			}
		}
	}
	return out.Close()
}
