package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/u-root/u-root/pkg/boot/bzimage"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

var goldenVerb = verb{
	name:  "golden",
	args:  "FILE",
	short: "unpack a kernel as it was built, for the agent to compare hosts with",
	long: `Unpacks vmlinuz of x86-64, as a distributor's package has it, to BUILDID.vmlinux. On an agent's state disk that belongs into the directory
golden. An agent that finds the build of its host's kernel there compares that kernel's code and constants with it, and so finds, and can put right, what
was changed before it came. Without, it trusts the host as it is at that time.

Take the file from where the host cannot reach: from the distributor's signed package, not from the host.

  dpkg-deb -x linux-image-6.1.0-49-amd64_6.1.174-1_amd64.deb kernel
  backdoor golden kernel/boot/vmlinuz-6.1.0-49-amd64`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.StringVar(&o.output, "o", "", "`file` to write, instead of BUILDID.vmlinux")
	},
	run: func(_ context.Context, e *env, args []string) (int, error) {
		if len(args) != 1 {
			return 0, &usageError{verb: "golden", msg: "golden takes one file"}
		}
		b, err := os.ReadFile(args[0])
		if err != nil {
			return 0, err
		}
		if !bytes.HasPrefix(b, []byte("\x7fELF")) { // unpacked already
			var z bzimage.BzImage
			if err := z.UnmarshalBinary(b); err != nil {
				return 0, fmt.Errorf("unpack %s: %w; give vmlinuz of x86-64, as a distributor's package has it under boot", args[0], err)
			}
			b = z.KernelCode
		}
		k, err := kernel.OpenKnown(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return 0, fmt.Errorf("%s: %w", args[0], err)
		}
		out := e.o.output
		if out == "" {
			out = k.BuildID() + ".vmlinux"
		}
		if err := os.WriteFile(out, b, 0o644); err != nil {
			return 0, err
		}
		answer := struct {
			File    string `json:"file"`
			BuildID string `json:"buildID"`
			Bytes   int    `json:"bytes"`
		}{out, k.BuildID(), len(b)}
		return exitOK, e.answer(answer, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s: build %s, %d bytes\n", out, k.BuildID(), len(b))
			return err
		})
	},
}
