package builder

import (
	"fmt"
	"strings"
)

// An Image is what the agent's machine boots: a kernel, and an initramfs made of u-root's init and a few of its commands,
// kernel modules, and the agent. The first stage is one, too.
type Image struct {
	Name    string
	About   string
	GOARCH  string
	Kernel  string // a target of images/kernels
	DTB     string // device tree in the kernel's package; empty: the firmware or machine brings one
	Console string // the kernel's console on the machine that the image is tested on
	// Arguments are what the kernel is told beside its console and what all images' are, see CommandLine.
	Arguments string
	// Modules are packed with all they need. The agent loads them when their device is there.
	Modules []string
	// Commands are u-root's commands, built into one program. The agent needs init only; the others are for a person
	// who boots with rdinit=/bbin/gosh.
	Commands []string
	// Of, if not empty, names the image that this one is a variant of: it is made only when asked for by name.
	Of string
	// Programs are what it has beside the agent.
	Programs *Programs
	// Loader, if not empty, says that the image is a first stage, with cmd/backdoor-loader as its only program and no u-root init, and names the
	// image that it starts.
	Loader string
	// Budget bounds the sizes; a build that exceeds it fails.
	Budget Budget
}

// CommandLine is what the image's kernel is started with on the machine that it is tested on: it starts again after a panic, and does not
// test its crypto algorithms against known answers, which takes a part of a second under emulation.
func (i Image) CommandLine() string {
	return strings.TrimSpace("console=" + i.Console + " panic=-1 quiet cryptomgr.notests " + i.Arguments)
}

// A Budget bounds an image's sizes, in bytes.
type Budget struct {
	Initramfs int64 `json:"initramfs"` // compressed, agent included
	Unpacked  int64 `json:"unpacked"`  // what it takes of the machine's memory
}

// mb is a megabyte as image sizes are given: decimal.
const mb = 1_000_000

var commands = []string{"init", "gosh", "cat", "dmesg", "ip", "ls", "mount", "ps", "shutdown"}

// rootOnly is for arm64 kernels whose programs are all root's: with KASLR they would hide from their programs by page tables of their own, on
// processors without Meltdown, too. Each switch of them costs a processor time, and an emulated one its TLB: a start takes half as long without.
const rootOnly = "kpti=off"

// virtual are the devices of the lab's machines: disk and network, entropy.
var virtual = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_rng"}

// first is what a loader reaches slots and TPM by.
var first = []string{"virtio_pci", "virtio_blk"}

// tunnels are for encrypted paths to peers (boot/wireguard).
const tunnels = "wireguard"

// state is what mounting an ext4 state disk takes; its checksums come from a module of their own.
var state = []string{"ext4", "crc32c_generic"}

// Images returns all images.
func Images() []Image {
	return []Image{
		{
			Name: "dpu-arm64", About: "SmartNIC or DPU with 64-bit Arm cores",
			GOARCH: "arm64", Kernel: "6.1-cloud-arm64", Console: "ttyAMA0",
			Arguments: rootOnly,
			Modules:   join(virtual, state, tunnels, "tpm_tis"),
			Commands:  commands,
			Budget:    Budget{Initramfs: 16 * mb, Unpacked: 48 * mb},
		},
		{
			Name: "dpu-arm64-ipmi", About: "dpu-arm64 with ipmitool, for hosts whose BMC has IPMI only",
			GOARCH: "arm64", Kernel: "6.1-cloud-arm64", Console: "ttyAMA0",
			Arguments: rootOnly,
			Modules:   join(virtual, state, tunnels, "tpm_tis"),
			Commands:  commands,
			Of:        "dpu-arm64",
			Programs: &Programs{
				Suite: "bookworm", Arch: "arm64", Files: []string{"usr/bin/ipmitool"},
				// Without this list of vendors' numbers it complains at each start, which bmclib takes for a part of its answer.
				Data:     []string{"usr/share/misc/enterprise-numbers.txt"},
				Packages: []string{"ipmitool", "libc6", "libfreeipmi17", "libgcrypt20", "libgpg-error0", "libreadline8", "libssl3", "libtinfo6"},
			},
			Budget: Budget{Initramfs: 20 * mb, Unpacked: 66 * mb},
		},
		{
			Name: "dpu-amd64", About: "SmartNIC or DPU with x86 cores; the agent on an x86 board",
			GOARCH: "amd64", Kernel: "6.1-generic", Console: "ttyS0",
			Modules:  join(virtual, state, tunnels, "i6300esb", "lpc_ich", "iTCO_wdt"),
			Commands: commands,
			Budget:   Budget{Initramfs: 17 * mb, Unpacked: 52 * mb},
		},
		{
			Name: "bmc-armv7", About: "baseboard management controller, ASPEED AST2600",
			GOARCH: "arm", Kernel: "6.1-armmp", DTB: "aspeed-ast2600-evb.dtb", Console: "ttyS4,115200n8",
			Modules: join(nil, state, tunnels, "mdio_aspeed", "ftgmac100", "kcs_bmc_aspeed", "i2c_aspeed", "gpio_aspeed",
				"sdhci_of_aspeed", "mmc_block"),
			Commands: commands,
			Budget:   Budget{Initramfs: 16 * mb, Unpacked: 48 * mb},
		},
		{
			Name: "loader-arm64", About: "first stage of dpu-arm64",
			GOARCH: "arm64", Kernel: "6.1-cloud-arm64", Console: "ttyAMA0",
			Arguments: rootOnly,
			Modules:   join(first, nil, "tpm_tis"), Loader: "dpu-arm64",
			Budget: Budget{Initramfs: 2.5 * mb, Unpacked: 6 * mb},
		},
		{
			Name: "loader-amd64", About: "first stage of dpu-amd64",
			GOARCH: "amd64", Kernel: "6.1-generic", Console: "ttyS0",
			Modules: join(first, nil, "i6300esb"), Loader: "dpu-amd64",
			Budget: Budget{Initramfs: 2.5 * mb, Unpacked: 6 * mb},
		},
		{
			Name: "loader-armv7", About: "first stage of bmc-armv7",
			GOARCH: "arm", Kernel: "6.1-armmp", DTB: "aspeed-ast2600-evb.dtb", Console: "ttyS4,115200n8",
			Arguments: "nr_cpus=1", // or it refuses kexec
			Modules:   []string{"sdhci_of_aspeed", "mmc_block"}, Loader: "bmc-armv7",
			Budget: Budget{Initramfs: 3 * mb, Unpacked: 6 * mb},
		},
	}
}

func join(a, b []string, more ...string) []string {
	return append(append(append([]string(nil), a...), b...), more...)
}

// Lookup returns the image with that name, or an error that lists the names there are.
func Lookup(name string) (Image, error) {
	var names []string
	for _, i := range Images() {
		if i.Name == name {
			return i, nil
		}
		names = append(names, i.Name)
	}
	return Image{}, fmt.Errorf("no image %q; there are %s", name, strings.Join(names, ", "))
}
