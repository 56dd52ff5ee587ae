package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/kernel/isf"
)

var typesVerb = verb{
	name:  "types",
	args:  "FILE",
	short: "make types for hosts whose kernels carry none: BTF of dwarf2json's file",
	long: `Makes raw BTF of an Intermediate Symbol File, the JSON that dwarf2json writes of a kernel with debug symbols and that Volatility 3 reads
(also compressed by gzip or xz). A kernel that was built without CONFIG_DEBUG_INFO_BTF tells nothing of its types; with this file it is
understood like any other. The file is for one build.

On an agent's state disk it belongs into the directory types, by the kernel's release or its build ID: types/5.4.0-custom.btf. The verbs that read
memory by themselves take it with -types. Raw BTF of that build from elsewhere (pahole -J, BTFHub) does as well, as it is.

  dwarf2json linux --elf vmlinux > custom.json
  backdoor types custom.json -o 5.4.0-custom.btf
  backdoor -types 5.4.0-custom.btf -image vmcore ps`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.StringVar(&o.output, "o", "", "`file` to write, instead of RELEASE.btf")
	},
	run: func(_ context.Context, e *env, args []string) (int, error) {
		if len(args) != 1 {
			return 0, &usageError{verb: "types", msg: "types takes one file"}
		}
		raw, f, err := readTypes(args[0])
		if err != nil {
			return 0, err
		}
		if f == nil {
			return 0, fmt.Errorf("%s is raw BTF already: use it as it is", args[0])
		}
		out := e.o.output
		if out == "" {
			words := strings.Fields(f.Banner) // "Linux version RELEASE ..."
			if len(words) < 3 || words[2] != filepath.Base(words[2]) {
				return 0, fmt.Errorf("%s does not say which kernel it is of: give the file to write with -o", args[0])
			}
			out = words[2] + ".btf"
		}
		if err := os.WriteFile(out, raw, 0o644); err != nil {
			return 0, err
		}
		answer := struct {
			File   string `json:"file"`
			Banner string `json:"banner"`
			Types  int    `json:"types"`
			Bytes  int    `json:"bytes"`
		}{out, f.Banner, f.Types, len(raw)}
		return exitOK, e.answer(answer, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s: %d types, %d bytes, of %s\n", out, f.Types, len(raw), f.Banner)
			return err
		})
	},
}

// readTypes reads raw BTF, or makes it of a symbol file, which it then returns, too.
func readTypes(path string) ([]byte, *isf.File, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer file.Close()
	var magic [2]byte
	n, err := io.ReadFull(file, magic[:])
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return nil, nil, err
	}
	in := io.MultiReader(bytes.NewReader(magic[:n]), file)
	if magic == [2]byte{0x9f, 0xeb} {
		raw, err := io.ReadAll(io.LimitReader(in, 16<<20+1))
		return raw, nil, err
	}
	f, err := isf.Read(in)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return f.BTF, f, nil
}

// elsewhere is the answer to kernel.Options.Types that -types asks for; nil if it does not.
func (e *env) elsewhere() (func(kernel.Build) ([]byte, error), error) {
	path := e.o.types
	if path == "" {
		return nil, nil
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("-types: %w", err)
	}
	if st.IsDir() {
		return kernel.TypesDir(path), nil
	}
	raw, f, err := readTypes(path)
	if err != nil {
		return nil, fmt.Errorf("-types: %w", err)
	}
	return func(b kernel.Build) ([]byte, error) {
		if f != nil && f.Banner != "" && f.Banner != b.Banner {
			return nil, fmt.Errorf("%s is of another kernel: %s; this one is %s", path, f.Banner, b.Banner)
		}
		return bytes.Clone(raw), nil
	}, nil
}
