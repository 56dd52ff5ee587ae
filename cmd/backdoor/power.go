package main

import (
	"context"
	"flag"
	"fmt"
	"io"

	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// resets maps the words of the command to Redfish's.
var resets = map[string]schema.ResetType{
	"on": "On", "off": "ForceOff", "cycle": "PowerCycle", "reset": "ForceRestart", "nmi": "Nmi", "soft": "GracefulShutdown",
	"restart": "GracefulRestart", "button": "PushPowerButton", "pause": "Pause", "resume": "Resume",
}

var powerVerb = verb{
	name:  "power",
	args:  "status|on|off|cycle|reset|nmi|soft|restart|button|pause|resume",
	words: []string{"status", "on", "off", "cycle", "reset", "nmi", "soft", "restart", "button", "pause", "resume"},
	short: "the host's power",
	long: `The agent passes the order on to the host's BMC. Orders that stop the host are asked for once more, unless -y is given.

  status  on, off or paused
  on      switch on
  off     take the power away at once
  cycle   off and on again
  reset   restart at once
  nmi     send a non-maskable interrupt
  soft    ask the operating system to shut down
  restart ask the operating system to restart
  button  press the power button
  pause   stop all CPUs where they are, if the BMC can
  resume  have them go on

  backdoor power status
  backdoor power cycle -y`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.yes, "y", false, "do not ask")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) != 1 {
			return 0, &usageError{verb: "power", msg: "power takes one word"}
		}
		word := args[0]
		a, err := e.openOperator(ctx)
		if err != nil {
			return 0, err
		}
		defer a.Close()
		if word == "status" {
			state, err := a.PowerState(ctx)
			if err != nil {
				return 0, err
			}
			code := exitOK
			if state == "" {
				state, code = "unknown", exitUnsure
			}
			return code, e.answer(map[string]schema.PowerState{"power": state}, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, query.Clean(string(state)))
				return err
			})
		}
		if word != "on" && word != "resume" && !e.o.yes {
			yes, err := e.confirm(fmt.Sprintf("Power %s the host behind %s?", word, a.Name()))
			if err != nil {
				return 0, err
			}
			if !yes {
				return 0, fmt.Errorf("nothing was done")
			}
		}
		if err := a.Reset(ctx, resets[word]); err != nil {
			return 0, fmt.Errorf("power %s: %w", word, err)
		}
		return exitOK, e.answer(map[string]string{"done": word}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "power %s: done\n", word)
			return err
		})
	},
}
