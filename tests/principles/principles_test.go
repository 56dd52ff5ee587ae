package principles

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

var (
	whole = flag.Bool("whole", false, "all rows, and what is planted against each; without it the few that make test has time for")
	out   = flag.String("out", "", "put the table into this `file` as well")
)

// row is one experiment.
type row struct {
	principle  string
	mechanism  string
	experiment string
	quick      bool // part of make test
	// run does the experiment and returns what it measured; an error says how the principle was broken.
	run func(context.Context, *bench) (string, error)
	// plant breaks the principle on purpose, until undo is called; run must fail then.
	plant func(context.Context, *bench) (undo func() error, err error)
	// missing says why the laboratory cannot test this.
	missing string
}

// bench is the laboratory: a host whose only network is a cable into the DPU, a machine on the wire, an operator.
type bench struct {
	lab   *lab.Lab
	host  *lab.Host
	agent *operator.Agent
	peer  *peer // a machine on the wire
	// What plants change.
	target     target
	allow      []string
	calm       bool // something is left undone, or done, so that the row must turn red
	onHost     bool // the counted guest has an agent of its own
	guest      *counted
	alone      []uint64  // the counted guest's marks when nobody observes it
	unrepaired *executed // by the guest of which nothing is killed
	held       *access.Agreement
	enrolled   time.Duration // how long the agent took to lock it
	lines      io.Writer     // of what is more than a row has room for
	dir        string
	memory     *client.Client // of who may reach memory
	poller     *export.Poller // of the agent's health page
	monitor    *roce.Device   // a monitor's
}

// policy bounds a flood without asking, as a fleet's would: one of more than the limit lets through.
var policy = json.RawMessage(`{
  "version": 1,
  "detectors": {"floodSYNs": 700},
  "rules": [{"finding": "network-flood", "action": "rate-limit", "mode": "automatic", "maxPerHour": 60, "then": "quarantine"}]
}`)

func TestPrinciples(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: tests that start virtual machines are left out")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 35*time.Minute)
	defer cancel()
	l, err := lab.Up(ctx, lab.Config{Datapath: true, Unagreed: true, SecondKernel: true, Policy: policy, Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Log(err)
		}
	}()
	b := &bench{lines: t.Output(), lab: l, host: l.Host, target: theAgent, dir: t.TempDir()}
	if b.agent, err = operator.DialDPU(ctx, l.DPU); err != nil {
		t.Fatal(err)
	}
	if _, err := b.agent.WaitAttached(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if b.enrolled, err = b.enrol(ctx); err != nil {
		t.Fatal(err)
	}
	end, err := l.Wire.Endpoint("peer")
	if err != nil {
		t.Fatal(err)
	}
	b.peer = newPeer(ctx, end)
	defer end.Close()

	var table strings.Builder
	fmt.Fprintf(&table, "| principle | mechanism | experiment | figure | result |\n|---|---|---|---|---|\n")
	for _, r := range rows() {
		if !*whole && !r.quick {
			continue
		}
		figure, result := "", "not tested: "+r.missing
		if r.missing == "" {
			result = "not run" // -run has left it out
			t.Run(name(r.experiment), func(t *testing.T) {
				result = "pass"
				figure, err = b.try(ctx, r)
				if err != nil {
					result = "**FAIL**: " + err.Error()
					t.Error(err)
				}
				t.Logf("%s: %s", r.experiment, figure)
				// What a row may have left that broke off keeps back what the rows behind it are about.
				release := func() {
					if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
						t.Logf("release the host: %v", err)
					}
				}
				if err != nil {
					release()
					return
				}
				if r.plant == nil || !*whole {
					return
				}
				undo, err := r.plant(ctx, b)
				if err != nil {
					t.Fatalf("plant a violation: %v", err)
				}
				green, violated := b.try(ctx, r)
				if err := undo(); err != nil {
					t.Errorf("take the violation away: %v", err)
				}
				release()
				if violated == nil {
					t.Errorf("the row stays green under a violation: %s", green)
					result = "**FAIL**: stays green under a violation"
				} else {
					t.Logf("under a violation: %v", violated)
				}
			})
		}
		fmt.Fprintf(&table, "| %s | %s | %s | %s | %s |\n", r.principle, r.mechanism, r.experiment, figure, result)
	}
	t.Logf("\n%s", table.String())
	if t.Failed() {
		t.Logf("the DPU's console ends with\n%s", strings.Join(l.DPU.Console().Tail(40), "\n"))
	}
	if *out != "" {
		if err := os.MkdirAll(filepath.Dir(*out), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(*out, []byte(table.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// try runs a row's experiment within its time.
func (b *bench) try(ctx context.Context, r row) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, fmt.Errorf("not done within 3 minutes"))
	defer cancel()
	return r.run(ctx, b)
}

// name makes a short name for a test of an experiment.
func name(experiment string) string {
	if i := strings.IndexAny(experiment, ":;,"); i > 0 {
		experiment = experiment[:i]
	}
	return experiment
}
