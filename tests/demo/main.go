// Demo shows the first healing on two virtual machines, with a timeline and what was measured.
//
// Synopsis:
//
//	go run ./tests/demo [-kernel 6.1|6.12|…] [-path window|dma] [-slots] [-no-writes] [-dir DIR] [-json]
//
// Description:
//
// A Debian host falls ill twice: a process runs away, and then the kernel panics. The agent, in its own image on a second,
// arm64 machine that sees the host's memory through a PCI window, finds both. It kills the process by memory writes alone;
// after the panic it reads the host's log out of the dead memory and has the host power-cycled.
//
// Everything measured comes from outside the agent unless the table says so. With -no-writes the agent may not write to the host, and the
// repair must fail visibly: that is the demonstration's own control, and it exits with 1.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"

	"github.com/backdoor-rhs/backdoor/tests/healing"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o healing.Options
	flags.StringVar(&o.Lab.HostKernel, "kernel", "6.1", "the host's kernel: 6.1, 6.12, 6.1-generic or 6.12-generic")
	flags.StringVar(&o.Lab.Engine, "path", lab.EngineWindow, "how the agent reaches the host's memory: window, or dma for the model of a DMA engine")
	flags.BoolVar(&o.Lab.Slots, "slots", false, "start the DPU as a real one is: a loader verifies and measures the image on its disk, and the DPU's TPM proves it")
	flags.BoolVar(&o.Lab.NoWrites, "no-writes", false, "keep the agent from writing to the host: the repair must then fail")
	flags.StringVar(&o.Lab.Dir, "dir", "", "keep consoles, state disk and logs in this directory")
	asJSON := flags.Bool("json", false, "print the report as JSON")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "demo: %q is not understood; run with -h for the flags\n", flags.Arg(0))
		return 2
	}
	o.Log = stdout
	if *asJSON {
		o.Log = stderr
	}
	rep, err := healing.Run(ctx, o)
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		enc.Encode(rep)
	} else {
		table(stdout, rep)
	}
	if err != nil {
		fmt.Fprintf(stderr, "\ndemo: the host was not healed: %v\n", err)
		return 1
	}
	return 0
}

func table(w io.Writer, r *healing.Report) {
	if len(r.Figures) == 0 {
		return
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MEASURED\tVALUE\tSAYS")
	for _, f := range r.Figures {
		fmt.Fprintf(t, "%s\t%s\t%s\n", f.Name, f.Value, f.From)
	}
	t.Flush()
}
