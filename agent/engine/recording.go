package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/internal/durable"
)

const (
	recordingsMost = 32
	recordingBytes = 16 << 20 // of all that are kept
	recordingTasks = 1 << 13  // of all samples of one
	recordingEnd   = ".json.gz"
)

// ErrNoRecording means that no recording of a finding is kept.
var ErrNoRecording = errors.New("no such recording is kept")

// taken is a series as it was when findings were told of.
type taken struct {
	findings []string // IDs
	series   detect.Pass
}

// keepSeries hands out the series that a pass was judged by: to who waits for it, and to be kept with what was found in this pass.
func (w *watcher) keepSeries(p *detect.Pass) {
	e := w.e
	e.mu.Lock()
	found, asked := e.fresh, e.asked
	e.fresh, e.asked = nil, nil
	e.mu.Unlock()
	if len(asked) == 0 && (len(found) == 0 || e.o.RecordDir == "") {
		return
	}
	series := p.Excerpt(recordingTasks)
	for _, ch := range asked {
		ch <- series // has room
	}
	if len(found) == 0 || e.o.RecordDir == "" {
		return
	}
	select {
	case e.taken <- taken{found, series}:
	default:
		e.mu.Lock()
		e.note("recording", fmt.Errorf("that of %s was dropped: those before it are not written yet", strings.Join(found, ", ")))
		e.mu.Unlock()
	}
}

// writeRecordings works until ctx ends.
func (e *Engine) writeRecordings(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case t := <-e.taken:
			if err := e.writeRecording(t); err != nil {
				e.mu.Lock()
				e.note("recording", err)
				e.mu.Unlock()
			}
		}
	}
}

func (e *Engine) writeRecording(t taken) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic while it is written: %v", r)
		}
	}()
	if err := os.MkdirAll(e.o.RecordDir, 0o700); err != nil {
		return err
	}
	var b bytes.Buffer
	if err := detect.WriteRecording(&b, t.series); err != nil {
		return err
	}
	for _, id := range t.findings {
		if err := e.makeRoom(b.Len()); err != nil {
			return err
		}
		if err := durable.WriteFile(filepath.Join(e.o.RecordDir, id+recordingEnd), b.Bytes(), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// recordings lists what is kept, the oldest first.
func (e *Engine) recordings() ([]fs.FileInfo, error) {
	entries, err := os.ReadDir(e.o.RecordDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var all []fs.FileInfo
	for _, x := range entries {
		if !strings.HasSuffix(x.Name(), recordingEnd) {
			continue
		}
		if i, err := x.Info(); err == nil {
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	return all, err
}

// makeRoom removes the oldest recordings until there is room for one more of so many bytes.
func (e *Engine) makeRoom(bytes int) error {
	all, err := e.recordings()
	if err != nil {
		return err
	}
	total := int64(bytes)
	for _, i := range all {
		total += i.Size()
	}
	for len(all) > 0 && (len(all) >= recordingsMost || total > recordingBytes) {
		if err := os.Remove(filepath.Join(e.o.RecordDir, all[0].Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		total -= all[0].Size()
		all = all[1:]
	}
	return nil
}

var findingID = regexp.MustCompile(`^[a-z][a-z0-9-]{0,63}$`)

// Recording returns the series of samples by which a finding was judged when it was told of, as detect.ReadRecording reads it; of no finding, the
// series as it is now. The latest 32 are kept, if Options.RecordDir is set; ErrNoRecording says which.
func (e *Engine) Recording(ctx context.Context, finding string) ([]byte, error) {
	if finding == "" {
		ch := make(chan detect.Pass, 1)
		e.mu.Lock()
		e.asked = append(e.asked, ch)
		e.mu.Unlock()
		var b bytes.Buffer
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case series := <-ch:
			err := detect.WriteRecording(&b, series)
			return b.Bytes(), err
		}
	}
	if findingID.MatchString(finding) && e.o.RecordDir != "" {
		b, err := os.ReadFile(filepath.Join(e.o.RecordDir, finding+recordingEnd))
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return b, err
		}
	}
	all, err := e.recordings()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, i := range all {
		names = append(names, strings.TrimSuffix(i.Name(), recordingEnd))
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("recording of %q: %w; there is none yet", finding, ErrNoRecording)
	}
	return nil, fmt.Errorf("recording of %q: %w; there are those of %s", finding, ErrNoRecording, strings.Join(names, ", "))
}
