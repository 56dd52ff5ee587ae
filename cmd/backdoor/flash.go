package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/firmware"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// flashFlags are the flags of the verb flash.
type flashFlags struct {
	waves, apply string
	parallel     int
	force, keep  bool
	wait         time.Duration
}

var flashVerb = verb{
	name:  "flash",
	args:  "BUNDLE",
	short: "update the agents of many hosts, in waves",
	long: `Sends a bundle to the agents of -host or -context, each a list separated by commas, has them install it, and waits until each runs it
and says that it is good. An upload that an earlier run has begun goes on where it broke off.

The agents are taken in waves: with -waves 1,5 one first, then five, and then five at a time until all are done. A wave begins only when the
one before is done and all is well. After the first failure no other agent is begun; those that are under way are finished.

-apply says when: now restarts the agent's machine (the host's is left alone), reset waits for its next start, request for StartUpdate.
With reset and request an agent counts as done when it has the bundle.

  backdoor flash dpu.bundle -context web1,web2,web3 -waves 1,2
  backdoor flash dpu.bundle -host 10.0.0.5,10.0.0.6 -password-file pw -insecure -apply reset`,
	flags: func(fs *flag.FlagSet, o *options) {
		f := &o.flash
		fs.StringVar(&f.waves, "waves", "", "`sizes` of the waves, the last one again and again (default all at once)")
		fs.IntVar(&f.parallel, "parallel", 8, "`number` of agents at a time within a wave")
		fs.StringVar(&f.apply, "apply", "now", "`when` to apply it: now, reset or request")
		fs.BoolVar(&f.force, "force", false, "also where something newer runs; never below the security epoch")
		fs.BoolVar(&f.keep, "keep-going", false, "go on after a failure")
		fs.DurationVar(&f.wait, "wait", 10*time.Minute, "longest `time` for one agent")
	},
	run: runFlash,
}

var applyTimes = map[string]string{"now": "Immediate", "reset": "OnReset", "request": "OnStartUpdateRequest"}

// flashed is how the update of one agent ended.
type flashed struct {
	Agent  string  `json:"agent"`
	Done   bool    `json:"done"`
	Result string  `json:"result"`
	Took   float64 `json:"tookSeconds,omitempty"`
}

func runFlash(ctx context.Context, e *env, args []string) (int, error) {
	f := &e.o.flash
	if len(args) != 1 {
		return 0, &usageError{verb: "flash", msg: "flash takes one bundle"}
	}
	if applyTimes[f.apply] == "" {
		return 0, &usageError{verb: "flash", msg: fmt.Sprintf("-apply %s: want now, reset or request", f.apply)}
	}
	waves, err := parseWaves(f.waves)
	if err != nil {
		return 0, err
	}
	in, err := os.Open(args[0])
	if err != nil {
		return 0, err
	}
	defer in.Close()
	// What the bundle says of itself is enough here: the agents verify it.
	_, _, m, _, err := bundle.Read(in)
	if err != nil {
		return 0, fmt.Errorf("flash %s: %w", args[0], err)
	}
	img, err := selfTrusted(in)
	if err != nil {
		return 0, fmt.Errorf("flash %s: %w", args[0], err)
	}
	if st, err := in.Stat(); err != nil || st.Size() != img.Size() {
		return 0, fmt.Errorf("flash %s: it does not have the %d bytes of its manifest", args[0], img.Size())
	}
	agents, err := e.flashTargets()
	if err != nil {
		return 0, err
	}
	b := newBoard(e.stderr, file(e.stderr) != nil && isTerminal(file(e.stderr)) && !e.o.json)
	all := make([]flashed, len(agents))
	for i, a := range agents {
		all[i] = flashed{Agent: a.label, Result: "not begun"}
	}
	failed := false
	var mu sync.Mutex // guards failed
	for start, w := 0, 0; start < len(agents); w++ {
		size := len(agents) - start
		if len(waves) > 0 {
			size = min(size, waves[min(w, len(waves)-1)])
		}
		var wg sync.WaitGroup
		turn := make(chan struct{}, max(f.parallel, 1))
		for i := start; i < start+size; i++ {
			turn <- struct{}{}
			mu.Lock()
			stop := failed && !f.keep || ctx.Err() != nil
			mu.Unlock()
			if stop {
				<-turn
				break
			}
			wg.Go(func() {
				defer func() { <-turn }()
				began := time.Now()
				ctx, cancel := context.WithTimeout(ctx, f.wait)
				defer cancel()
				result, err := e.flashOne(ctx, agents[i], in, img, func(format string, a ...any) { b.say(agents[i].label, fmt.Sprintf(format, a...)) })
				all[i].Took = time.Since(began).Seconds()
				if all[i].Done, all[i].Result = err == nil, result; err != nil {
					all[i].Result = err.Error()
					mu.Lock()
					failed = true
					mu.Unlock()
				}
				b.end(agents[i].label, map[bool]string{true: "done: ", false: "FAILED: "}[err == nil]+all[i].Result)
			})
		}
		wg.Wait()
		start += size
		if failed && !f.keep || ctx.Err() != nil {
			break
		}
	}
	code := exitOK
	if slices.ContainsFunc(all, func(r flashed) bool { return !r.Done }) {
		code = exitError
	}
	return code, e.answer(all, func(w io.Writer) error {
		l := &lines{w: w}
		done := 0
		for _, r := range all {
			if r.Done {
				done++
			} else {
				l.printf("%s: %s\n", query.Clean(r.Agent), query.Clean(r.Result))
			}
		}
		l.printf("%s %s: %d of %d agents done\n", m.Product, m.Version, done, len(all))
		return l.err
	})
}

// selfTrusted opens a bundle by its own key sets.
func selfTrusted(in io.ReaderAt) (*bundle.Image, error) {
	roots, _, _, _, err := bundle.Read(in)
	if err != nil {
		return nil, err
	}
	root, err := bundle.ReadRoots(roots)
	if err != nil {
		return nil, err
	}
	return bundle.OpenAt(in, bundle.Policy{Root: root})
}

func parseWaves(text string) (sizes []int, err error) {
	if text == "" {
		return nil, nil
	}
	for s := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || n < 1 {
			return nil, &usageError{verb: "flash", msg: fmt.Sprintf("-waves %s: want numbers from 1 on, separated by commas", text)}
		}
		sizes = append(sizes, n)
	}
	return sizes, nil
}

// flashTarget is one agent.
type flashTarget struct {
	label string
	at    agentAt
	c     *client.Client
}

// flashTargets makes a client for each agent of the lists.
func (e *env) flashTargets() (all []flashTarget, err error) {
	names, byHost := strings.Split(e.o.host, ","), true
	if e.o.host == "" {
		names, byHost = strings.Split(e.o.context, ","), false
	}
	var once string // a password from standard input or from a person is for all
	asked := false
	seen := map[string]bool{}
	for _, name := range names {
		one := *e
		if byHost {
			one.o.host = strings.TrimSpace(name)
		} else {
			one.o.context = strings.TrimSpace(name)
		}
		at, err := one.target()
		if err != nil {
			return nil, err
		}
		if seen[at.URL] {
			return nil, &usageError{verb: "flash", msg: fmt.Sprintf("%s is there twice", at.URL)}
		}
		seen[at.URL] = true
		if at.User == "" {
			at.User = "admin"
		}
		own := at.Password != "" || at.Token != "" || at.PasswordFile != "" && at.PasswordFile != "-"
		if !own && asked {
			at.Password, at.PasswordFile = once, ""
		}
		password, err := one.password(at)
		if err != nil {
			return nil, err
		}
		if !own {
			once, asked = password, true
		}
		c, err := one.client(at, password)
		if err != nil {
			return nil, err
		}
		label := at.Name
		if label == "" {
			label = at.URL
		}
		all = append(all, flashTarget{label, at, c})
	}
	return all, nil
}

// flashOne updates one agent and returns what came of it.
func (e *env) flashOne(ctx context.Context, t flashTarget, in io.ReaderAt, img *bundle.Image, say func(string, ...any)) (string, error) {
	f := &e.o.flash
	m := &img.Manifest
	digest := firmware.DigestOf(&img.Head)
	var s schema.UpdateService
	say("looking")
	if err := t.c.Get(ctx, client.UpdateURI, &s); err != nil {
		return "", e.explain(t.at, err)
	}
	defer func() {
		if t.at.Token == "" {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			_ = t.c.Close(ctx) // the machine may be restarting
		}
	}()
	running, err := runningImage(ctx, t.c)
	if err != nil {
		return "", e.explain(t.at, err)
	}
	if running != nil && running.Version == m.Version && !f.force {
		return "version " + m.Version + " runs already", nil
	}
	var partial firmware.UpdateOEM
	if _, err := client.OEM(s.OEM, &partial); err != nil {
		return "", err
	}
	o := client.PushOptions{Force: f.force, Apply: applyTimes[f.apply]}
	if partial.Digest == digest && partial.Received < img.Size() {
		o.Offset = partial.Received
	}
	began, last := time.Now(), 0
	task, err := t.c.Push(ctx, in, img.Size(), o, func(n int64) {
		if p := int(n * 100 / img.Size()); p > last {
			last = p
			say("sending %s %3d %%  %.1f MB/s", bar(p), p, float64(n-o.Offset)/1e6/time.Since(began).Seconds())
		}
	})
	if err != nil {
		return "", e.explain(t.at, err)
	}
	_, err = t.c.Wait(ctx, task.ODataID, func(task schema.Task) {
		doing := ""
		if n := len(task.Messages); n > 0 {
			doing = task.Messages[n-1].Message
		}
		if task.PercentComplete != nil {
			say("installing %s %3d %%  %s", bar(*task.PercentComplete), *task.PercentComplete, doing)
		}
	})
	var failed *client.TaskError
	if err != nil && (f.apply != "now" || errors.As(err, &failed)) {
		return "", e.explain(t.at, err)
	}
	if f.apply != "now" {
		return "version " + m.Version + " is installed", nil
	}
	return awaitImage(ctx, t.c, m.Version, say)
}

// runningImage returns the inventory's item of what runs; nil if it does not say.
func runningImage(ctx context.Context, c *client.Client) (*schema.SoftwareInventory, error) {
	for s, err := range client.Members[schema.SoftwareInventory](ctx, c, client.UpdateURI+"/FirmwareInventory") {
		if err != nil {
			return nil, err
		}
		if s.Active != nil && *s.Active {
			return &s, nil
		}
	}
	return nil, nil
}

// awaitImage waits until the agent runs a version and says that it is good, or runs something else because it was not.
func awaitImage(ctx context.Context, c *client.Client, version string, say func(string, ...any)) (string, error) {
	say("restarting")
	for {
		var s schema.UpdateService
		err := c.Get(ctx, client.UpdateURI, &s)
		if err == nil {
			var o firmware.UpdateOEM
			var running *schema.SoftwareInventory
			if _, err = client.OEM(s.OEM, &o); err == nil {
				running, err = runningImage(ctx, c)
			}
			switch {
			case err != nil || running == nil:
			case o.Fallback != "":
				return "", fmt.Errorf("it was given up, and version %s runs: %s", running.Version, o.Fallback)
			case running.Version == version && running.Status != nil && running.Status.Health == schema.HealthOK:
				return "version " + version + " runs and is good", nil
			case running.Version == version:
				say("version %s runs, on trial", version)
			}
		}
		var refused *client.Error
		if errors.As(err, &refused) && (refused.Status == 401 || refused.Status == 403) {
			return "", err // its sessions end with a restart, and there is no password to log in with again
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("it is installed, and the agent did not come back to say that it is good: %w", ctx.Err())
		case <-time.After(time.Second):
		}
	}
}

func bar(percent int) string {
	const width = 20
	n := max(0, min(percent, 100)) * width / 100
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", width-n) + "]"
}

// A board shows what goes on at several agents: on a terminal a line each that changes in place, elsewhere a line when something new begins.
type board struct {
	w    io.Writer
	live bool

	mu    sync.Mutex // guards what follows
	order []string
	text  map[string]string
	drawn int
}

func newBoard(w io.Writer, live bool) *board {
	return &board{w: w, live: live, text: map[string]string{}}
}

func (b *board) say(who, text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	text = query.Clean(text)
	old, known := b.text[who]
	if !known {
		b.order = append(b.order, who)
	}
	b.text[who] = text
	if b.live {
		b.draw()
		return
	}
	first := func(s string) string { w, _, _ := strings.Cut(s, " "); return w }
	if !known || first(old) != first(text) {
		fmt.Fprintf(b.w, "%s: %s\n", query.Clean(who), text)
	}
}

// end prints a line that stays.
func (b *board) end(who, text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.live && b.drawn > 0 {
		fmt.Fprintf(b.w, "\x1b[%dA\x1b[J", b.drawn)
		b.drawn = 0
	}
	delete(b.text, who)
	b.order = slices.DeleteFunc(b.order, func(s string) bool { return s == who })
	fmt.Fprintf(b.w, "%s: %s\n", query.Clean(who), query.Clean(text))
	if b.live {
		b.draw()
	}
}

// draw draws the lines again. Precondition: mu is held.
func (b *board) draw() {
	if b.drawn > 0 {
		fmt.Fprintf(b.w, "\x1b[%dA\x1b[J", b.drawn)
	}
	for _, who := range b.order {
		line := fmt.Sprintf("%-24s %s", query.Clean(who), b.text[who])
		if r := []rune(line); len(r) > 100 {
			line = string(r[:100])
		}
		fmt.Fprintln(b.w, line)
	}
	b.drawn = len(b.order)
}
