package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	retryEvery  = 250 * time.Millisecond // between attempts to open memory or to find a kernel
	retryMost   = time.Second
	openTimeout = 5 * time.Minute  // one search of all memory over a slow path
	passTimeout = 10 * time.Second // one pass
	proveEvery  = 500 * time.Millisecond
	// pathPatience is how long reads may fail in other ways than ErrLinkDown before the path is opened anew, and
	// corruptPatience how long the kernel may make no sense before it is taken for overwritten.
	pathPatience    = 3 * time.Second
	corruptPatience = 500 * time.Millisecond
	uuidEvery       = 5 * time.Second // until the host has told its system UUID
	// A kernel that has panicked, or shows no life for quietAfter, may be a corpse beside a new kernel: memory is searched
	// again, at most every searchEvery.
	quietAfter  = 5 * time.Second
	searchEvery = 2 * time.Second
	signsEvery  = 700 * time.Millisecond
	// What a look at signs has seen for the first time is looked at again soon: it is told of if it was not just in the making.
	signsAgain = 150 * time.Millisecond
	probeEvery = time.Second // detectors' passes while there is no kernel
	// panicEvery is how often it is looked between two passes whether the kernel has panicked, at least.
	panicEvery = 12 * time.Millisecond
	// keptTasks and keptCPUs bound what all samples together hold, about 200 bytes for each.
	keptTasks = 1 << 17
	keptCPUs  = 1 << 17
	// settleTimeout is a little more than the executor takes to undo a plan.
	settleTimeout = 12 * time.Second
)

// loop attaches and watches until ctx ends.
func (e *Engine) loop(ctx context.Context) {
	w := watcher{e: e, root: ctx, stopPass: func() {}}
	defer func() { w.stopPass() }()
	if e.o.OwnThread {
		w.thread.begin(e.log)
	}
	defer w.closeMemory()
	defer e.settle()
	for ctx.Err() == nil {
		if err := w.guarded("loop", func() error { return w.turn(ctx) }); err != nil && ctx.Err() == nil {
			e.mu.Lock()
			e.note("loop", err)
			e.mu.Unlock()
			sleep(ctx, retryEvery)
		}
	}
}

// settle waits until no repair is under way: one that was broken off has to take back what it stored, while there is memory.
func (e *Engine) settle() {
	late := time.NewTimer(settleTimeout)
	defer late.Stop()
	select {
	case e.healing <- struct{}{}:
		<-e.healing
	case <-late.C:
		e.log.Error("a repair does not end; leaving it", "plan", e.State().Healing)
	}
}

// watcher is the loop's own state; only the loop touches it.
type watcher struct {
	e      *Engine
	root   context.Context // ends with the loop; a pass has a shorter one
	thread thread
	mem    hostmem.Memory
	hint   kernel.Hint   // where the kernel was last
	down   time.Time     // since when the path has been dead; zero while it works
	was    bool          // a kernel was attached before
	wait   time.Duration // back-off

	t         target
	boot      string
	firmware  []byte // its traces when t was attached; nil if there are none
	ended     string // boot ID of the kernel that a reset has ended
	tickless  bool
	beats     []kernel.Heartbeat
	tasks     []detect.TaskSample
	usage     []kernel.Usage
	signs     []kernel.Signs
	network   []detect.NetworkSample
	jams      []detect.JamSample
	memory    []detect.MemorySample
	guards    map[string]kernel.Guard // as they stood strongest
	weakened  []detect.Weakened
	roots     []rootProcess
	risen     risen
	said      uint64 // sequence number of the newest record of the log that was looked at; zero: none yet
	nextSigns time.Time
	nextJams  time.Time
	// nextMailbox is when the host's memory is searched for an agreement again.
	nextMailbox time.Time
	noKernel    time.Time // since when there is none though memory can be read, after one was there; zero while there is one
	golden      golden
	nextTasks   time.Time
	nextThin    time.Time // of usage
	nextProve   time.Time
	nextHint    time.Time // when the hint is kept anew
	moved       time.Time // when the host last showed life, or was attached
	lived       time.Time // when it last showed life; zero if not since the attach
	badSince    time.Time
	nextUUID    time.Time // zero when there is nothing to find out
	nextSearch  time.Time
	found       chan search // from the search in the background; nil if there is none
	stopSearch  context.CancelFunc
	searches    sync.WaitGroup
	nextRun     []time.Time // of each detector
	lastProbe   time.Time
	due         time.Time // when the next pass should begin
	passes      context.Context
	stopPass    context.CancelFunc // ends passes
	renew       time.Time          // when passes is made anew
	load        ewma
	panicked    bool // as the latest pass saw it
	bySight     bool // the latest pass began because a panic was seen between two
	rehearsed   bool // the news of a panic, since t was attached
	bytes       ewma
	began       time.Time     // the latest pass, when the thread had
	used        time.Duration // had so much processor time
}

// ewma is a mean that forgets.
type ewma struct {
	v float64
	n int // of what was added
}

func (m *ewma) add(x float64) {
	const least = 0.02 // of fifty passes: seldom looks fall into them about as often as they are taken
	m.n++
	m.v += max(least, 1/float64(m.n)) * (x - m.v)
}

// guarded runs f and turns a panic into an error: a fault in one pass never stops the loop.
func (w *watcher) guarded(where string, f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic in %s: %v", where, r)
			w.e.log.Error("recovered", "where", where, "panic", r, "stack", string(debug.Stack()))
		}
	}()
	return f()
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// turn does whatever is next.
func (w *watcher) turn(ctx context.Context) error {
	w.thread.prefer(w.t != nil)
	switch {
	case w.mem == nil:
		return w.openMemory(ctx)
	case w.t == nil:
		return w.attach(ctx)
	}
	return w.watch(ctx)
}

func (w *watcher) setPhase(p Phase, why string) {
	e := w.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.phase != p {
		e.phase, e.since = p, time.Now()
	}
	e.why = why
	if p == Attached {
		e.progress = nil
	}
}

// pause waits for the next attempt, longer from time to time, while the detectors that need no kernel go on.
func (w *watcher) pause(ctx context.Context, why string) {
	w.wait = min(max(2*w.wait, retryEvery), retryMost)
	for end := time.Now().Add(w.wait); ctx.Err() == nil && time.Now().Before(end); {
		w.probe(ctx, why)
		sleep(ctx, min(time.Until(end), probeEvery))
	}
}

// probe runs the detectors without a kernel.
func (w *watcher) probe(ctx context.Context, why string) {
	now := time.Now()
	if now.Sub(w.lastProbe) < probeEvery {
		return
	}
	w.lastProbe = now
	p := &detect.Pass{Now: now, Path: why}
	if w.was {
		p.PathDown = w.down
	}
	if w.was && w.mem != nil {
		if w.noKernel.IsZero() {
			w.noKernel = now
		}
		if w.resting(now) != "" {
			w.noKernel = now // whoever switched it off is to switch it on first
		}
		p.NoKernel = w.noKernel
	}
	w.judge(ctx, p)
	w.e.mu.Lock()
	defer w.e.mu.Unlock()
	w.e.tellChanged()
}

func (w *watcher) openMemory(ctx context.Context) error {
	e := w.e
	mem, err := e.o.Memory(ctx)
	if err != nil {
		if w.down.IsZero() {
			w.down = time.Now()
		}
		w.setPhase(NoMemory, fmt.Sprintf("open host memory: %v", err))
		w.pause(ctx, err.Error())
		return nil
	}
	w.mem = mem
	e.mu.Lock()
	e.mem = mem
	e.mu.Unlock()
	return nil
}

func (w *watcher) closeMemory() {
	if w.mem == nil {
		return
	}
	w.endSearch()
	w.searches.Wait() // it reads from this memory
	w.golden.end()
	w.detach()
	e := w.e
	e.mu.Lock()
	e.mem, e.shown = nil, shown{}
	e.mu.Unlock()
	if err := w.mem.Close(); err != nil {
		e.log.Warn("close host memory", "err", err)
	}
	w.mem = nil
}

func (w *watcher) detach() {
	w.t = nil
	w.e.mu.Lock()
	w.e.target, w.e.dead = nil, false
	w.e.mu.Unlock()
}

// attach looks for a kernel once.
func (w *watcher) attach(ctx context.Context) error {
	e := w.e
	if !w.was && w.hint.Note == 0 {
		w.hint = e.loadHint()
	}
	if w.was {
		w.setPhase(Lost, "looking for the kernel that comes next")
	} else {
		w.setPhase(Searching, "looking for a kernel")
	}
	began := time.Now()
	octx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	t, err := e.src.open(octx, w.mem, kernel.Options{Logger: e.log, Hint: w.hint, Cache: &e.builds, Types: e.o.Types, Progress: func(stage string, done, total uint64) {
		e.mu.Lock()
		e.progress = &Progress{stage, done, total}
		e.mu.Unlock()
	}})
	if err != nil {
		w.hint = kernel.Hint{}
		if w.pathLost(ctx, err) {
			return nil
		}
		w.down = time.Time{}
		phase := Searching
		if w.was {
			phase = Lost
		}
		w.setPhase(phase, err.Error())
		w.pause(ctx, err.Error())
		return nil
	}
	if w.corpse(t.Info()) {
		const why = "the host was reset, and no kernel has come up since"
		w.setPhase(Lost, why)
		w.pause(ctx, why)
		return nil
	}
	w.take(ctx, t, time.Since(began))
	return nil
}

// pathLost closes the memory if an error means that the path to it is lost.
func (w *watcher) pathLost(ctx context.Context, err error) bool {
	if !errors.Is(err, hostmem.ErrLinkDown) {
		return false
	}
	if w.down.IsZero() {
		w.down = time.Now()
	}
	w.lose("the path to the host's memory is lost: " + err.Error())
	w.setPhase(NoMemory, err.Error())
	w.closeMemory()
	w.pause(ctx, err.Error())
	return true
}

// take makes t the kernel that is watched.
func (w *watcher) take(ctx context.Context, t target, took time.Duration) {
	e := w.e
	info, now := t.Info(), time.Now()
	// What was known of a clock may speak for a kernel when the agent comes back, not when the kernel was lost.
	// What was seen of this start of a kernel before stays: who tears a memory apart while he puts old pages back must not have that forgotten.
	if info.BootID == "" || info.BootID != w.boot {
		w.beats, w.usage = nil, nil
	}
	w.t, w.boot, w.hint, w.nextHint = t, info.BootID, kernel.Hint{Note: info.Note}, now.Add(hintEvery)
	w.wait, w.down, w.was = 0, time.Time{}, true
	w.tasks, w.signs, w.nextRun = nil, nil, make([]time.Time, len(e.detectors))
	w.nextTasks, w.nextSigns, w.nextProve, w.badSince, w.moved, w.nextSearch, w.due = now, now.Add(signsEvery), now, time.Time{}, now, now.Add(searchEvery), now
	w.nextUUID, w.lived, w.began = time.Time{}, time.Time{}, time.Time{}
	w.golden.end()
	w.golden.next = now.Add(goldenAfter)
	w.jams, w.memory, w.nextJams, w.noKernel, w.said, w.roots = nil, nil, now, time.Time{}, 0, nil
	w.guards, w.weakened, w.panicked, w.rehearsed, w.risen = nil, nil, false, false, risen{}
	// A kernel that goes on after what looked like a reset shows that this host's firmware writes there while it runs.
	lies := info.BootID == w.ended
	w.firmware, w.ended = nil, ""
	if info.Arch == "x86_64" && !lies {
		w.firmware = firmwareTraces(w.mem)
	}
	vctx, cancel := context.WithTimeout(ctx, passTimeout)
	defer cancel()
	w.tickless = tickless(vctx, t)
	uuid, err := systemUUID(vctx, t)
	if err != nil {
		w.nextUUID = now.Add(uuidEvery)
	}
	e.saveHint(t)

	e.mu.Lock()
	defer e.mu.Unlock()
	e.target, e.dead, e.uuid, e.attachTook, e.moved, e.beat, e.compared = t, false, uuid, took, time.Time{}, kernel.Heartbeat{}, nil
	e.attaches++
	if e.phase != Attached {
		e.since = now
	}
	e.phase, e.why, e.progress = Attached, "", nil
	if err != nil && !errors.Is(err, kernel.ErrNotSupported) {
		e.note("system UUID", err)
	}
	e.newKernel(info.BootID)
	e.record("attached", info)
	if e.o.Writes && e.o.Journal != nil && t.image() != nil && !e.followed[info.BootID] {
		select {
		case e.healing <- struct{}{}:
			e.followed[info.BootID] = true // later attaches to it are of this start
			go e.followUp(ctx)
		default:
		}
	}
	e.publish(kernelEvent(EventAttached, info, fmt.Sprintf("attached to %s on %s in %v", info.Release, info.Hostname, took.Round(time.Millisecond))))
}

// lose gives the kernel up.
func (w *watcher) lose(why string) {
	e := w.e
	if w.t == nil {
		return
	}
	info := w.t.Info()
	w.t = nil
	w.endSearch()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.target, e.dead = nil, false
	e.phase, e.since, e.why = Lost, time.Now(), why
	e.record("lost", map[string]string{"boot": info.BootID, "why": why})
	e.publish(kernelEvent(EventLost, info, why))
}

// watch makes one pass when it is due.
func (w *watcher) watch(ctx context.Context) error {
	e := w.e
	if !w.idle(ctx) {
		return nil
	}
	began, used := time.Now(), w.thread.used()
	late := began.Sub(w.due) > e.config.Heartbeat
	var cost kernel.Cost
	var err error
	if cost, err = w.pass(w.limited(ctx, began)); err == nil {
		w.e.decide(ctx, began) // what it begins outlives the pass
		w.e.tidy(ctx, began)
	}
	took := time.Since(began)
	interval := began.Add(e.config.Heartbeat)
	if after := time.Now().Add(e.config.Heartbeat / 5); interval.Before(after) {
		interval = after // leave the machine some air when a pass takes longer than the interval
	}
	w.due = interval
	if !w.began.IsZero() {
		if period := began.Sub(w.began).Seconds(); period > 0 {
			w.load.add((used - w.used).Seconds() / period)
			w.bytes.add(float64(cost.Bytes) / period)
		}
	}
	w.began, w.used = began, used

	e.mu.Lock()
	e.passes++
	c := &e.cost
	c.At, c.Took, c.Reads, c.Bytes = began, took, cost.Reads, cost.Bytes
	c.Load, c.BytesPerSec = min(w.load.v, 1), w.bytes.v
	if late {
		c.Late++
	}
	e.tellChanged()
	e.mu.Unlock()

	switch {
	case err == nil:
		w.badSince = time.Time{}
	case ctx.Err() != nil:
	case w.pathLost(ctx, err):
	case errors.Is(err, kernel.ErrGone):
		w.lose("the host runs another kernel, or none: " + err.Error())
	default:
		var corrupt *kernel.CorruptError
		if w.badSince.IsZero() {
			w.badSince = began
		}
		switch bad := time.Since(w.badSince); {
		case errors.As(err, &corrupt) && bad > corruptPatience:
			w.lose("the kernel is being overwritten: " + err.Error())
		case bad > pathPatience:
			w.lose("the kernel cannot be read: " + err.Error())
			w.closeMemory()
		}
		return err
	}
	return nil
}

// limited returns a context for a pass that ends after passTimeout, or a little earlier: it serves for many passes.
func (w *watcher) limited(ctx context.Context, now time.Time) context.Context {
	if now.After(w.renew) {
		w.stopPass()
		w.passes, w.stopPass = context.WithTimeout(ctx, passTimeout)
		w.renew = now.Add(passTimeout / 4)
	}
	return w.passes
}

// idle waits until the next pass is due, or there is a reason to begin it now. It returns false if there is none to begin any more. A panic is
// looked for meanwhile: nothing else is as urgent, and so cheap to see.
func (w *watcher) idle(ctx context.Context) bool {
	// Who has just made a pass because of a look sleeps first: a host that is overwritten, or plays with the word, must not keep it from all sleep.
	look := !w.bySight
	w.bySight = false
	for d := time.Until(w.due); d > 0; d = time.Until(w.due) {
		parts := (d + panicEvery - 1) / panicEvery // equal ones: each awakening costs
		if !look {
			w.thread.sleep(ctx, d/parts)
		} else if w.nap(ctx, d/parts) {
			w.bySight = true
			return true
		}
		look = true
		switch { // no select, which takes three locks each time
		case ctx.Err() != nil:
			return false
		case len(w.e.wake) > 0:
			<-w.e.wake
			return true
		case len(w.found) > 0:
			w.consider(ctx, <-w.found)
			return w.t != nil
		}
	}
	return true
}

// nap looks whether the kernel has panicked, and sleeps for d if it has not. With precedence, where memory is mapped, the look costs nothing.
func (w *watcher) nap(ctx context.Context, d time.Duration) (panicked bool) {
	img := w.t.image()
	if img != nil && !w.panicked {
		if w.thread.has {
			if panicked, err := img.SleepUnlessPanicked(d); err == nil {
				return panicked
			}
		}
		if panicked, err := img.Panicked(ctx); err == nil && panicked {
			return true
		}
	}
	w.thread.sleep(ctx, d)
	return false
}

// tellChanged wakes those who wait for a pass. e.mu is held.
func (e *Engine) tellChanged() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// pass reads and judges once.
func (w *watcher) pass(ctx context.Context) (kernel.Cost, error) {
	e := w.e
	now := time.Now()
	l := w.t.look(ctx)
	p := &detect.Pass{Now: now, Tickless: w.tickless}
	if v, ok := l.(*kernel.View); ok {
		p.View = v
		defer v.Close()
	}
	// At first what is cheapest and matters most.
	told, perr := w.lookForPanic(ctx, l, p)
	if told {
		return l.Cost(), perr
	}
	looked := now
	overtaken := func() bool { // where a pass takes its time, the panic does not wait for its end
		if time.Since(looked) < panicEvery/2 {
			return false
		}
		looked = time.Now()
		told, perr = w.lookForPanic(ctx, l, p)
		return told
	}
	beat, berr := l.Heartbeat()
	e.mean(&e.cost.MeanHeartbeat, time.Since(now))
	if berr == nil {
		w.addBeat(beat)
		p.Beats = w.beats
	}
	usage, uerr := l.Usage()
	if uerr == nil {
		w.addUsage(usage)
		p.Usage = w.usage
	} else if errors.Is(uerr, kernel.ErrNotSupported) {
		uerr = nil // its detectors will say that they lack it
	}
	var terr error
	var listed []kernel.Task // in this pass
	signsDue := !now.Before(w.nextSigns)
	// Signs rest on a list of tasks: where one is due soon, it is taken now for both.
	if e.tasksDue(w.nextTasks, now) || e.config.Hurry(w.usage, w.tasks) || signsDue && w.nextTasks.Sub(now) < signsEvery {
		w.nextTasks = now.Add(e.config.Tasks)
		var s detect.TaskSample
		if s, terr = taskSample(l, w.tasks); terr == nil {
			s.Mapped = mapped(p.View, s.Tasks, usage.Total)
			var before []kernel.Task
			if n := len(w.tasks); n > 0 {
				before = w.tasks[n-1].Tasks
			}
			if p.View != nil {
				if w.risen.see(before, s.Tasks, p.View.Exec); len(w.risen.news) > 0 {
					w.nextTasks = now.Add(signsAgain)
				}
			}
			w.tasks, listed = append(w.tasks, s), s.Tasks
			_, keep := e.config.Keep()
			for len(w.tasks) > 2 && now.Sub(w.tasks[1].At) > keep {
				w.tasks = slices.Delete(w.tasks, 0, 1)
			}
			w.tasks = thin(w.tasks, keptTasks)
			e.mean(&e.cost.MeanTasks, s.Took)
		}
	}
	if n := len(w.tasks); n > 0 && terr == nil {
		p.Tasks = w.tasks
		w.lookForMailbox(p.View, w.tasks[n-1].Tasks, now)
	}
	if overtaken() {
		return l.Cost(), perr
	}
	// On a host without any life a look at what stands is as good as many.
	var serr error
	alarming := false
	if signsDue || listed != nil && w.nextSigns.Sub(now) < signsEvery/2 {
		w.nextSigns = now.Add(signsEvery)
		var s kernel.Signs
		if s, serr = l.SignsAmong(listed); serr == nil {
			before := 0
			if n := len(w.signs); n > 0 {
				before = alarms(w.signs[n-1])
			}
			if alarms(s) > before {
				w.nextSigns = now.Add(signsAgain)
			}
			w.signs = append(w.signs, s)
			alarming = s.Oopses > 0 || alarms(s) > 0
			for len(w.signs) > 2 && now.Sub(w.signs[1].At) > e.config.RCUFor+5*time.Second {
				w.signs = slices.Delete(w.signs, 0, 1)
			}
		}
	}
	if serr == nil {
		p.Signs = w.signs
	}
	if overtaken() {
		return l.Cost(), perr
	}
	if berr == nil && !w.panicked {
		p.Changes, p.Uncompared = w.compare(p.View, now)
		alarming = alarming || len(p.Changes) > 0
	}
	if overtaken() {
		return l.Cost(), perr
	}
	if berr == nil && !w.panicked && !now.Before(w.nextJams) {
		w.nextJams = now.Add(jamsEvery)
		s := jam(p.View, p.Panic, w.jams)
		w.strain(p.View, &s)
		w.addJam(s)
		w.countMemory(p.View, now)
		w.lookAtGuards(p.View)
	}
	p.Jams, p.Memory, p.Weakened, p.Risen = w.jams, w.memory, w.weakened, w.risen.tasks
	p.Took = time.Since(now)
	failed := errors.Join(perr, berr, uerr, terr)
	if serr != nil { // the passes that follow will show whether it is more than that
		e.log.Debug("cannot look for signs", "err", serr)
	}
	if overtaken() {
		return l.Cost(), perr
	}
	dead := w.panicked || time.Since(w.moved) > quietAfter
	if errors.Is(failed, hostmem.ErrLinkDown) {
		return l.Cost(), failed
	}
	// What is about to be said of this kernel must be about this kernel: nothing new is believed, and no failure blamed on
	// it, before it is proven after the reading.
	if failed != nil || alarming || now.After(w.nextProve) || w.wouldSpeak(p) {
		if err := w.t.Prove(ctx); err != nil && !errors.Is(err, kernel.ErrTorn) {
			return l.Cost(), err
		}
		if w.wasReset() {
			w.ended = w.boot
			return l.Cost(), fmt.Errorf("its firmware has run: the host was reset: %w", kernel.ErrGone)
		}
		w.nextProve = now.Add(proveEvery)
		if now.After(w.nextHint) {
			w.nextHint = now.Add(hintEvery)
			w.e.saveHint(w.t)
		}
	}
	// A kernel that is overwritten piece by piece, as after a reset, may still be proven while what it counts makes no sense any more. Nothing is said
	// of such a look, and nothing kept: corruptPatience ends the kernel if it stays so.
	var corrupt *kernel.CorruptError
	if errors.As(errors.Join(perr, berr, uerr), &corrupt) {
		if berr == nil {
			w.beats = w.beats[:len(w.beats)-1]
		}
		return l.Cost(), failed
	}
	var uuid string
	if now.After(w.nextUUID) && w.nextUUID.After(time.Time{}) {
		w.nextUUID = now.Add(uuidEvery)
		if uuid, _ = systemUUID(ctx, w.t); uuid != "" {
			w.nextUUID = time.Time{}
		}
	}
	e.mu.Lock()
	e.dead, e.moved = dead, w.lived
	if berr == nil {
		e.beat = beat
	}
	if uuid != "" {
		e.uuid = uuid
	}
	e.mu.Unlock()
	w.judge(ctx, p)
	if dead {
		w.searchAgain(ctx)
	} else if p.View != nil && failed == nil && !w.rehearsed {
		w.rehearsed = true
		w.rehearse(ctx, p.View)
	}
	return l.Cost(), failed
}

// alarms is how much in a sample speaks of hands that are not the kernel's own.
func alarms(s kernel.Signs) int {
	return len(s.Strays) + len(s.Hidden) + len(s.HiddenModules) + len(s.HiddenPrograms) + len(s.Forged) + len(s.Shared) + len(s.Hooks)
}

func (e *Engine) tasksDue(next, now time.Time) bool {
	if !now.Before(next) {
		return true
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.force) > 0
}

func (e *Engine) mean(to *time.Duration, d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if *to == 0 {
		*to = d
	} else {
		*to += (d - *to) / 20
	}
}

// taskSample lists the tasks: as many as before, or a few more.
func taskSample(l look, before []detect.TaskSample) (detect.TaskSample, error) {
	s := detect.TaskSample{At: time.Now()}
	if n := len(before); n > 0 {
		s.Tasks = make([]kernel.Task, 0, len(before[n-1].Tasks)+8)
	}
	for t, err := range l.TasksRoughly() {
		if err != nil {
			return s, fmt.Errorf("list tasks: %w", err)
		}
		s.Tasks = append(s.Tasks, t)
	}
	s.Took = time.Since(s.At)
	return s, nil
}

// mapped looks up what the big processes have asked for.
func mapped(v *kernel.View, tasks []kernel.Task, total uint64) map[int]uint64 {
	if v == nil || total == 0 {
		return nil
	}
	var all map[int]uint64
	for _, t := range tasks {
		if t.PID != t.TGID || float64(t.RSS) < detect.BigTask*float64(total) {
			continue
		}
		if n, err := v.Mapped(t); err == nil {
			if all == nil {
				all = make(map[int]uint64)
			}
			all[t.TGID] = n
		}
	}
	return all
}

func (w *watcher) addBeat(b kernel.Heartbeat) {
	if n := len(w.beats); n > 0 && alive(w.beats[n-1], b) {
		w.moved, w.lived = b.At, b.At
	}
	w.beats = append(w.beats, b)
	keep, _ := w.e.config.Keep()
	for len(w.beats) > 2 {
		many, at := len(w.beats)*len(b.CPUs) > keptCPUs, 0
		// The kernel is given up and sought anew where its clock goes back, which may take longer than beats are kept.
		if !many && w.beats[0].Mono > w.beats[1].Mono && b.At.Sub(w.beats[1].At) < backKept {
			at = 2
		}
		if !many && b.At.Sub(w.beats[max(at, 1)].At) <= keep {
			break
		}
		if at == 0 {
			w.beats = w.beats[1:] // nothing is moved; append begins a new array in the end
			continue
		}
		w.beats = slices.Delete(w.beats, at, at+1)
	}
}

// backKept is how long two beats that show a clock going back are kept.
const backKept = 2 * time.Minute

const (
	usageDense  = 15 * time.Second // in which every sample is kept
	usageSparse = 10 * time.Second // between two samples before that
	usageKept   = time.Hour
)

// addUsage keeps what is needed of the samples: all lately, few of before.
func (w *watcher) addUsage(u kernel.Usage) {
	w.usage = append(w.usage, u)
	if u.At.Before(w.nextThin) {
		return
	}
	w.nextThin = u.At.Add(time.Second)
	// The oldest of the dense ones become sparse ones, or go.
	for i := 1; i < len(w.usage)-1; i++ {
		if u.At.Sub(w.usage[i].At) <= usageDense {
			break
		}
		if w.usage[i+1].At.Sub(w.usage[i-1].At) <= usageSparse {
			w.usage = slices.Delete(w.usage, i, i+1)
			i--
		}
	}
	for len(w.usage) > 1 && u.At.Sub(w.usage[0].At) > usageKept {
		w.usage = slices.Delete(w.usage, 0, 1)
	}
}

// thin leaves samples out of the middle of a series, where they are densest, until all together have no more than most tasks:
// a host with a fork bomb must not exhaust the agent's memory. What a detector measures from, the oldest and the newest
// two, stays.
func thin(samples []detect.TaskSample, most int) []detect.TaskSample {
	total := 0
	for _, s := range samples {
		total += len(s.Tasks)
	}
	for total > most && len(samples) > 3 {
		least, at := time.Duration(math.MaxInt64), 1
		for i := 1; i < len(samples)-2; i++ {
			if gap := samples[i+1].At.Sub(samples[i-1].At); gap < least {
				least, at = gap, i
			}
		}
		total -= len(samples[at].Tasks)
		samples = slices.Delete(samples, at, at+1)
	}
	return samples
}

// alive reports whether the host has done anything between two beats.
func alive(a, b kernel.Heartbeat) bool {
	if a.Jiffies != b.Jiffies || a.Mono != b.Mono || len(a.CPUs) != len(b.CPUs) {
		return true
	}
	for i := range b.CPUs {
		x, y := &a.CPUs[i], &b.CPUs[i]
		if x.TimerIRQs != y.TimerIRQs || x.IRQs != y.IRQs || x.Switches != y.Switches || x.Clock != y.Clock {
			return true
		}
	}
	return false
}

// lookForPanic reads whether the kernel has panicked. If that is news it is told at once, as all of this pass: everything else can wait for the next.
func (w *watcher) lookForPanic(ctx context.Context, l look, p *detect.Pass) (told bool, err error) {
	s, err := l.Panic()
	if err != nil {
		return false, err
	}
	p.Panic = &s
	if !s.Panicked || w.panicked {
		w.panicked = s.Panicked
		return false, nil
	}
	// The kernel claims a panic some microseconds before it says why.
	for range 3 {
		if s.Message != "" {
			break
		}
		w.thread.sleep(ctx, 2*time.Millisecond)
		if again, err := l.Panic(); err == nil && again.Panicked {
			s = again
		}
	}
	return true, w.tellPanic(ctx, p)
}

// tellPanic has the detectors of a panic judge, once it is proven that this kernel has panicked.
func (w *watcher) tellPanic(ctx context.Context, p *detect.Pass) error {
	p.Beats, p.Usage, p.Tasks, p.Signs, p.Network = w.beats, w.usage, w.tasks, w.signs, w.network
	p.Jams, p.Memory, p.Weakened = w.jams, w.memory, w.weakened
	if err := w.t.Prove(ctx); err != nil && !errors.Is(err, kernel.ErrTorn) {
		return err
	}
	if w.wasReset() {
		w.ended = w.boot
		return fmt.Errorf("its firmware has run: the host was reset: %w", kernel.ErrGone)
	}
	w.panicked = true
	w.e.mu.Lock()
	w.e.dead, w.e.moved = true, w.lived
	w.e.mu.Unlock()
	w.judgeBy(ctx, p, ofPanic, nil)
	return nil
}

// rehearse goes the way of the news of a panic once, up to where it would be told: on a machine whose caches are cold of it, it takes several
// times as long as later.
func (w *watcher) rehearse(ctx context.Context, v *kernel.View) {
	s, err := v.RehearsePanic()
	if err != nil {
		w.e.log.Debug("what a panic leaves cannot be read", "err", err)
		return
	}
	now := time.Now()
	p := &detect.Pass{Now: now, Panic: &s}
	for _, d := range w.e.detectors {
		if !ofPanic(&d) {
			continue
		}
		found, err := d.Detect(ctx, p)
		if err != nil {
			continue
		}
		w.e.mu.Lock()
		for _, f := range found {
			_ = w.e.o.Policy.Decide(f, now, w.e.past)
			_ = findingEvent(EventFinding, f, f.Title)
		}
		w.e.mu.Unlock()
	}
}

// wouldSpeak reports whether judging this pass may change what is said of the host: the panic detector, whose one look is its
// verdict, has something to say, or something that was said may be taken back. All other new findings rest on series that
// are longer than the time between two proofs.
func (w *watcher) wouldSpeak(p *detect.Pass) bool {
	if p.Panic != nil && p.Panic.Panicked {
		return true
	}
	w.e.mu.Lock()
	defer w.e.mu.Unlock()
	return len(w.e.tracked) > 0
}

// ofPanic reports whether a detector needs no more than the state of a panic.
func ofPanic(d *detect.Detector) bool { return slices.Equal(d.Needs, []detect.Need{detect.NeedPanic}) }

// judge runs the detectors that are due and takes in what they say.
func (w *watcher) judge(ctx context.Context, p *detect.Pass) {
	e := w.e
	var force map[string]bool
	e.mu.Lock()
	if len(e.force) > 0 {
		force, e.force = e.force, make(map[string]bool)
	}
	e.mu.Unlock()
	w.judgeBy(ctx, p, func(*detect.Detector) bool { return true }, force)
	w.keepSeries(p)
}

// judgeBy runs those of some detectors that are due, or forced.
func (w *watcher) judgeBy(ctx context.Context, p *detect.Pass, which func(*detect.Detector) bool, force map[string]bool) {
	e := w.e
	if w.nextRun == nil {
		w.nextRun = make([]time.Time, len(e.detectors))
	}
	if p.Network == nil {
		p.Network = w.sampleNetwork(p.Now)
	}
	rests := w.resting(p.Now)
	e.mu.Lock()
	grant := e.o.Agreement.Grant(e.uuid) // to look takes no more than the agreement, whichever host this is
	e.mu.Unlock()
	at := time.Now()
	for i := range e.detectors {
		d := &e.detectors[i]
		if p.Now.Before(w.nextRun[i]) && !force[d.ID] || !which(d) {
			continue
		}
		e.mu.Lock()
		if err := grant.PermitDetector(d.ID); err != nil {
			e.status[i].Withheld, e.status[i].Health, e.status[i].Error = true, CouldNotTell, err.Error()
			e.update(d, nil, p.Now) // what it found under another agreement is over
			e.mu.Unlock()
			continue
		}
		cause := e.cause(d)
		e.mu.Unlock()
		// A tenth of a heartbeat early is in time: else a detector would run every second beat instead of each.
		w.nextRun[i] = p.Now.Add(d.Every - e.config.Heartbeat/10)
		var found []detect.Finding
		var err error
		switch lack := lacking(d, p); {
		case rests != "":
			err = fmt.Errorf("the host stands still: %s", rests)
		case cause != "":
			err = fmt.Errorf("explained by %s", cause)
		case lack != "":
			err = fmt.Errorf("lacks %s", lack)
			if p.Path != "" {
				err = fmt.Errorf("lacks %s: %s", lack, p.Path)
			}
		default:
			err = w.guarded(d.ID, func() (err error) {
				found, err = d.Detect(ctx, p)
				return err
			})
		}
		began := at
		at = time.Now()
		took := at.Sub(began)

		e.mu.Lock()
		s := &e.status[i]
		s.LastRun, s.Took, s.Error, s.Withheld = p.Now, took, "", false
		s.Runs++
		for _, t := range e.tracked {
			if t.detector == d.ID {
				t.Cause = cause
			}
		}
		switch {
		case err != nil:
			s.Health, s.Error = CouldNotTell, err.Error()
			if cause == "" && rests == "" && !errors.Is(err, detect.ErrTooEarly) {
				s.Faults++
			}
		default:
			e.update(d, found, p.Now)
			s.Health = Healthy
			if len(found) > 0 {
				s.Health = Ill
			}
		}
		e.mu.Unlock()
	}
}

// lacking returns what a detector needs and the pass does not have, or "".
func lacking(d *detect.Detector, p *detect.Pass) detect.Need {
	for _, n := range d.Needs {
		if !p.Has(n) {
			return n
		}
	}
	return ""
}

// search is what a search in the background has come to.
type search struct {
	t    target // nil if it found nothing
	took time.Duration
}

// searchAgain looks for a newer kernel in the background.
func (w *watcher) searchAgain(ctx context.Context) {
	if w.found != nil || time.Now().Before(w.nextSearch) {
		return
	}
	ctx, w.stopSearch = context.WithTimeout(context.WithoutCancel(ctx), openTimeout)
	found := make(chan search, 1)
	w.found = found
	mem, src := w.mem, w.e.src
	log, builds, types := w.e.log, &w.e.builds, w.e.o.Types
	w.searches.Go(func() {
		began := time.Now()
		var t target
		err := w.guarded("search", func() (err error) {
			t, err = src.open(ctx, mem, kernel.Options{Logger: log, Cache: builds, Types: types})
			return err
		})
		if err != nil {
			log.Debug("no newer kernel", "err", err, "took", time.Since(began))
			t = nil
		}
		found <- search{t, time.Since(began)}
	})
}

// endSearch gives the search in the background up.
func (w *watcher) endSearch() {
	if w.found != nil {
		w.stopSearch()
		w.found = nil
	}
}

// consider changes over to a kernel that the search has found, if it is another one, and alive.
func (w *watcher) consider(ctx context.Context, s search) {
	w.endSearch()
	w.nextSearch = time.Now().Add(max(searchEvery, 4*s.took))
	w.e.mu.Lock()
	if w.e.restarting {
		w.nextSearch = time.Now().Add(searchEvery / 2)
	}
	w.e.mu.Unlock()
	if s.t == nil || s.t.Info().BootID == w.boot || !slices.ContainsFunc(s.t.Info().Rungs, func(r kernel.Rung) bool { return r.Name == "alive" && r.OK }) {
		return
	}
	w.lose("a newer kernel runs on the host")
	w.take(ctx, s.t, s.took)
}

// hintEvery is how often the hint is kept anew while a kernel is watched. The hint makes the first attach after a restart of
// the agent fast. It is only a hint: kernel.Open proves what it finds.
const hintEvery = 30 * time.Second

func (e *Engine) hintPath() string { return filepath.Join(e.o.CacheDir, "kernel-note.json") }

func (e *Engine) loadHint() (h kernel.Hint) {
	if e.o.CacheDir == "" {
		return h
	}
	b, err := os.ReadFile(e.hintPath())
	if err != nil || json.Unmarshal(b, &h) != nil {
		return kernel.Hint{}
	}
	return h
}

func (e *Engine) saveHint(t target) {
	img := t.image()
	if e.o.CacheDir == "" || img == nil {
		return
	}
	b, err := json.Marshal(img.Hint())
	if err == nil {
		err = os.MkdirAll(e.o.CacheDir, 0o700)
	}
	if err == nil {
		err = durable.WriteFile(e.hintPath(), b, 0o600)
	}
	if err != nil {
		e.mu.Lock()
		e.note("keep where the kernel's note is", err)
		e.mu.Unlock()
	}
}
