package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

// upload measures what the agent holds in memory, by its machine's kernel, and how long GETs take, while update bundles stream into the slot
// that does not run and a file of the host's memory streams out. A bundle is as large as the DPU's image: more would not fit into a slot.
func upload(ctx context.Context, r *report, o options) (err error) {
	l, err := lab.Up(ctx, lab.Config{HostKernel: o.kernel, Slots: true, Log: r.log})
	if err != nil {
		return err
	}
	defer l.Close()
	if _, err := l.DPU.Console().Wait(ctx, 0, goodLine); err != nil { // no update is taken before
		return err
	}
	dir, err := os.MkdirTemp("", "bench-upload-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "bundle")
	if err := l.DPU.Slots.Make(path, lab.Release{Version: "1.1.0"}); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	var clients [3]*client.Client // each with connections of its own
	for i := range clients {
		if clients[i], err = l.DPU.Redfish(); err != nil {
			return err
		}
		defer clients[i].Close(context.WithoutCancel(ctx))
	}
	pushing, reading, downloading := clients[0], clients[1], clients[2]
	var entry *schema.LogEntry
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Second) { // once the agent is attached
		if entry, err = downloading.CollectMemory(ctx, 16<<20, 16<<20, nil); err == nil {
			break
		}
		if time.Now().After(end) {
			return err
		}
	}
	resident := func() (float64, error) {
		var d schema.ManagerDiagnosticData
		if err := reading.Get(ctx, "/redfish/v1/Managers/bmc/ManagerDiagnosticData", &d); err != nil {
			return 0, err
		}
		if len(d.TopProcesses) == 0 {
			return 0, errors.New("the agent does not tell of processes")
		}
		return float64(d.TopProcesses[0].ResidentSetSizeBytes) / (1 << 20), nil
	}
	idle, err := resident()
	if err != nil {
		return err
	}
	const how = "the DPU's kernel, /proc/PID/stat of the agent, by Redfish"
	r.add("DPU: resident memory of the agent, idle", "MiB", how, idle)

	streams, end := context.WithCancel(ctx)
	defer end()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	var downloaded int64
	var failed error
	wg.Go(func() {
		for streams.Err() == nil {
			n, err := downloading.Download(streams, entry.AdditionalDataURI, io.Discard)
			downloaded += n
			if err != nil && streams.Err() == nil {
				failed = fmt.Errorf("download: %w", err)
				return
			}
		}
	})
	var most []float64
	var took []time.Duration
	var sent int64
	began := time.Now()
	for range o.n {
		done := make(chan error, 1)
		go func() {
			task, err := pushing.Push(ctx, f, st.Size(), client.PushOptions{Apply: "OnStartUpdateRequest"}, nil)
			if err == nil {
				_, err = pushing.Wait(ctx, task.ODataID, nil)
			}
			done <- err
		}()
		for going := true; going; {
			rss, err := resident()
			if err != nil {
				return err
			}
			most = append(most, rss)
			at := time.Now()
			if _, err := reading.System(ctx); err != nil {
				return err
			}
			took = append(took, time.Since(at))
			select {
			case err := <-done:
				if err != nil {
					return fmt.Errorf("upload: %w", err)
				}
				going = false
			case <-time.After(100 * time.Millisecond):
			}
		}
		sent += st.Size()
	}
	lasted := time.Since(began)
	end()
	wg.Wait()
	if failed != nil {
		return failed
	}
	what := fmt.Sprintf("; %d bundles of %d MB in, %d MB out, in %v", o.n, st.Size()/1e6, downloaded/1e6, lasted.Round(time.Second))
	r.add("DPU: resident memory of the agent, streaming", "MiB", how+what, most...)
	r.add("DPU: GET of the system, streaming", "ms", "harness"+what, ms(took...)...)
	r.add("DPU: upload", "MB/s", "harness"+what, float64(sent)/1e6/lasted.Seconds())

	began = time.Now()
	if _, err := pushing.Push(ctx, zeros{}, 1<<30, client.PushOptions{}, nil); err == nil {
		return errors.New("the agent takes a bundle of 1 GiB that cannot fit into a slot")
	}
	r.add("DPU: until a bundle that does not fit is refused", "ms", "harness: 1 GiB of zeros", ms(time.Since(began))...)
	rss, err := resident()
	if err != nil {
		return err
	}
	r.add("DPU: resident memory of the agent, after it", "MiB", how, rss)
	// The agent logs the most that its kernel has counted, once that stands still.
	line, err := l.DPU.Console().Wait(ctx, 0, peakLine)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(5 * time.Second):
	}
	for _, l := range l.DPU.Console().Since(0) {
		if peakLine.MatchString(l.Text) {
			line = l
		}
	}
	kib, err := strconv.ParseFloat(peakLine.FindStringSubmatch(line.Text)[1], 64)
	if err != nil {
		return err
	}
	r.add("DPU: resident memory of the agent, the most ever", "MiB", "the DPU's kernel, ru_maxrss, from the start of the agent on, attach included", kib/1024)
	return nil
}

var peakLine = regexp.MustCompile(`msg=memory peakKiB=(\d+)`)

// zeros reads as zeros everywhere.
type zeros struct{}

func (zeros) ReadAt(b []byte, _ int64) (int, error) {
	clear(b)
	return len(b), nil
}
