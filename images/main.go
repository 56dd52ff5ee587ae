// Images builds what the agent's machine boots, and fetches the kernels that the project uses.
//
// Synopsis:
//
//	go run ./images build [-json] [-agent PACKAGE] [-out DIR] IMAGE...|all
//	go run ./images disk [-keys DIR] [-set-version VERSION] [-state MIB] IMAGE
//	go run ./images kernels [-json] [-refresh] [-all] [NAME...]
//	go run ./images list [-json]
//
// Description:
//
//	build    makes images in build/images: NAME.cpio.zst, NAME.vmlinuz, NAME.dtb where the board needs one, and NAME.json,
//	         which says what they are made of. It prints each size beside its budget, and fails if one is exceeded. Variants of
//	         other images are not among "all".
//	disk     makes of an image that was built a signed bundle, IMAGE.bundle, the image of a whole disk with it in its slots,
//	         IMAGE.disk.img, and a loader that trusts its key, IMAGE.loader.cpio. The key is a development key in DIR, which is
//	         made if it is not there; for a fleet, see: backdoor help image.
//	kernels  fetches kernels into the user's cache directory and prints which they are: by default those that "make setup"
//	         needs, with -all also those of the long tests. -refresh looks for newer ones than those in the cache.
//	list     lists the images and the kernels.
//
// Exit status: 0 done, 1 not done, 2 wrong usage.
package main

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/images/builder"
	"github.com/backdoor-rhs/backdoor/images/bundler"
	"github.com/backdoor-rhs/backdoor/images/kernels"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

const usage = `usage: go run ./images build [-json] [-agent PACKAGE] [-out DIR] IMAGE...|all
       go run ./images disk [-keys DIR] [-set-version VERSION] [-state MIB] IMAGE
       go run ./images kernels [-json] [-refresh] [-all] [NAME...]
       go run ./images list [-json]
`

// errUsage has been explained already.
var errUsage = errors.New("usage")

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	verbs := map[string]func(context.Context, []string, io.Writer, io.Writer) error{
		"build": build, "disk": disk, "kernels": fetch, "list": list,
	}
	if len(args) == 0 || verbs[args[0]] == nil {
		fmt.Fprint(stderr, usage)
		return 2
	}
	switch err := verbs[args[0]](ctx, args[1:], stdout, stderr); {
	case errors.Is(err, errUsage), errors.Is(err, flag.ErrHelp):
		return 2
	case err != nil:
		fmt.Fprintf(stderr, "images: %v\n", err)
		return 1
	}
	return 0
}

func flags(verb string, stderr io.Writer) (*flag.FlagSet, *bool) {
	f := flag.NewFlagSet(verb, flag.ContinueOnError)
	f.SetOutput(stderr)
	return f, f.Bool("json", false, "print JSON")
}

func parse(f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		return errUsage
	}
	return nil
}

func logger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey && a.Value.Any() == slog.LevelInfo {
			return slog.Attr{}
		}
		return a
	}}))
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "\t")
	return e.Encode(v)
}

func build(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f, asJSON := flags("build", stderr)
	agent := f.String("agent", "", "the agent's `package` (default ./cmd/backdoord)")
	out := f.String("out", "", "output `directory` (default build/images)")
	if err := parse(f, args); err != nil {
		return err
	}
	var imgs []builder.Image
	for _, name := range f.Args() {
		if name == "all" {
			imgs = slices.DeleteFunc(builder.Images(), func(i builder.Image) bool { return i.Of != "" })
			break
		}
		img, err := builder.Lookup(name)
		if err != nil {
			return err
		}
		imgs = append(imgs, img)
	}
	if len(imgs) == 0 {
		fmt.Fprint(stderr, usage)
		return errUsage
	}
	o := builder.Options{Agent: *agent, Out: *out, Logger: logger(stderr)}
	var all []*builder.Manifest
	var errs []error
	for _, img := range imgs {
		start := time.Now()
		m, err := builder.Build(ctx, img, o)
		if m != nil {
			all = append(all, m)
			if !*asJSON {
				summary(stdout, m, time.Since(start))
			}
		}
		errs = append(errs, err)
	}
	if *asJSON {
		errs = append(errs, printJSON(stdout, all))
	}
	return errors.Join(errs...)
}

// disk makes the image of a whole disk, with the development key.
func disk(_ context.Context, args []string, stdout, stderr io.Writer) error {
	f, _ := flags("disk", stderr)
	keys := f.String("keys", filepath.Join("build", "keys"), "`directory` with the development key")
	version := f.String("set-version", "0.0.1", "`version` of the bundle")
	state := f.Int64("state", 0, "`MiB` for the agent's file system, which is then to be made: mkfs.ext4 -L backdoor-state")
	dir := f.String("dir", filepath.Join("build", "images"), "`directory` of the images")
	if err := parse(f, args); err != nil {
		return err
	}
	if f.NArg() != 1 {
		fmt.Fprint(stderr, usage)
		return errUsage
	}
	img, err := builder.Lookup(f.Arg(0))
	if err != nil {
		return err
	}
	key, roots, err := bundler.Development(*keys)
	if err != nil {
		return err
	}
	root, err := bundle.ReadRoots(roots)
	if err != nil {
		return err
	}
	out := func(suffix string) string { return filepath.Join(*dir, img.Name+suffix) }
	err = bundler.MakeFile(out(".bundle"), bundler.Options{
		Machine: img.Name, Version: *version, Released: time.Now(), Dir: *dir, Roots: roots, Signers: []crypto.Signer{key},
	})
	if err != nil {
		return err
	}
	in, err := os.Open(out(".bundle"))
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.Remove(out(".disk.img")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := bundler.Burn(out(".disk.img"), in, slot.Layout{Agent: *state << 20}, bundle.Policy{Root: root}, time.Now()); err != nil {
		return err
	}
	loader := filepath.Join(*dir, "loader-"+img.GOARCH+".cpio.zst")
	if err := bundler.Loader(out(".loader.cpio"), loader, roots); err != nil {
		return fmt.Errorf("loader: %w", err)
	}
	fmt.Fprintf(stdout, "%s\n%s\n%s\n", out(".bundle"), out(".disk.img"), out(".loader.cpio"))
	return nil
}

func summary(w io.Writer, m *builder.Manifest, took time.Duration) {
	fmt.Fprintf(w, "%-10s initramfs %s of %s MB, unpacked %s of %s MB, agent %s MB, kernel %s %s MB, %.1f s, sha256 %.12s\n", m.Image,
		mb(m.Initramfs.Size), mb(m.Budget.Initramfs), mb(m.Unpacked), mb(m.Budget.Unpacked), mb(m.Agent.Size),
		m.Release, mb(m.Kernel.Size), took.Seconds(), m.Initramfs.SHA256)
}

func mb(n int64) string { return fmt.Sprintf("%.2f", float64(n)/1e6) }

func fetch(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f, asJSON := flags("kernels", stderr)
	refresh := f.Bool("refresh", false, "look for newer kernels than those in the cache")
	all := f.Bool("all", false, "also those that only the long tests boot, some 900 MB")
	if err := parse(f, args); err != nil {
		return err
	}
	var targets []kernels.Target
	for _, name := range f.Args() {
		t, err := kernels.Lookup(name)
		if err != nil {
			return err
		}
		targets = append(targets, t)
	}
	if len(targets) == 0 {
		targets = slices.DeleteFunc(kernels.Targets(), func(t kernels.Target) bool { return t.OnDemand && !*all })
	}
	cache := kernels.Cache{Log: logger(stderr)}
	var have []kernels.Kernel
	var errs []error
	for _, t := range targets {
		get := cache.Fetch
		if *refresh {
			get = cache.Refresh
		}
		k, err := get(ctx, t)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		have = append(have, k)
	}
	if *asJSON {
		return errors.Join(append(errs, printJSON(stdout, have))...)
	}
	tw := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	for _, k := range have {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", k.Target, k.Release, k.Version, k.Vmlinuz)
	}
	return errors.Join(append(errs, tw.Flush())...)
}

func list(_ context.Context, args []string, stdout, stderr io.Writer) error {
	f, asJSON := flags("list", stderr)
	if err := parse(f, args); err != nil {
		return err
	}
	if *asJSON {
		return printJSON(stdout, struct {
			Images  []builder.Image
			Kernels []kernels.Target
		}{builder.Images(), kernels.Targets()})
	}
	tw := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	for _, i := range builder.Images() {
		fmt.Fprintf(tw, "image\t%s\t%s\tkernel %s\t≤ %s MB\t%s\n", i.Name, i.GOARCH, i.Kernel, mb(i.Budget.Initramfs), i.About)
	}
	for _, t := range kernels.Targets() {
		var metas []string
		for _, m := range t.Metas {
			metas = append(metas, m.Package+" in "+m.Suite)
		}
		fmt.Fprintf(tw, "kernel\t%s\t%s\t%s\t\t\n", t.Name, t.Arch, strings.Join(metas, ", or "))
	}
	return tw.Flush()
}
