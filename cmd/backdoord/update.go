package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/redfish/firmware"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	// proveWithin is how long the image that runs has to say that it is good; then a machine on trial is started again.
	proveWithin = 90 * time.Second
	// doubtAfter is when the reason why it has not is noted: whatever ends the start then, the next image can tell.
	doubtAfter = 10 * time.Second
)

// images are the slots of the agent's machine and which of them runs.
type images struct {
	disk    *slot.Disk
	running slot.Name
	updater *firmware.Updater // nil if what runs is not what it should be
	within  time.Duration     // proveWithin
}

// openImages finds the slots, if the machine was started from one.
func (w *worker) openImages() {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		w.log.Warn("read the kernel's command line", "err", err)
	}
	defer close(w.imagesOpen)
	running := slot.Running(string(line))
	if running == "" {
		w.log.Info("not started from a slot: the agent does not update its machine")
		return
	}
	disk, err := slot.Find("/sys", "/dev")
	if err != nil {
		w.log.Error("find the slots: the agent cannot update its machine", "slot", running, "err", err)
		return
	}
	if err := disk.Damage(); err != nil {
		w.log.Error("the state of the slots was damaged", "err", err)
	}
	w.images = &images{disk: disk, running: running, within: proveWithin}
	if why := disk.State().Fallback; why != "" {
		w.log.Error("another image runs than the one that was to run", "slot", running, "why", why)
	}
	w.images.updater, err = firmware.New(firmware.Options{
		Disk: disk, Running: running, Logger: w.log, Parts: []schema.Link{{ID: "/redfish/v1/Managers/bmc"}},
		Restart: func(ctx context.Context) error { return w.reset(ctx, true) },
		Epoch: func() (uint32, error) {
			e, err := w.trust.epoch()
			return uint32(min(e, math.MaxUint32)), err
		},
	})
	if err != nil {
		w.log.Error("the agent cannot update its machine", "err", err)
	}
}

// configureUpdates gives the Redfish service its UpdateService.
func (w *worker) configureUpdates(o *service.Options) {
	if w.images != nil && w.images.updater != nil {
		firmware.Configure(o, w.images.updater)
	}
}

// prove asks the parts until each has shown that it works, and then says that the image is good. An image on trial that cannot say so in
// time gives way: the machine is started again, and in the end the image before it runs.
func (w *worker) prove(ctx context.Context) {
	i := w.images
	if i == nil {
		return
	}
	deadline, doubt := time.Now().Add(i.within), time.Now().Add(min(doubtAfter, i.within))
	for {
		err := w.works(ctx)
		if err == nil {
			err = w.good(ctx)
		}
		if err == nil || ctx.Err() != nil {
			return
		}
		s := i.disk.State()
		if time.Now().After(doubt) {
			if derr := i.disk.Doubt(i.running, err); derr != nil {
				w.log.Error("note why the image is not good", "err", derr)
			}
			doubt = doubt.Add(doubtAfter)
		}
		if now := time.Now(); now.After(deadline) {
			w.log.Error("the image does not say that it is good", "slot", i.running, "err", err)
			if s.Slot(i.running).Status == slot.Trial {
				w.log.Error("the image on trial gives way: restarting", "slot", i.running)
				_ = w.reset(ctx, true) // never fails
				return
			}
			deadline = now.Add(i.within)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

// good says that the image is good, and ends the way back to what is below it.
func (w *worker) good(ctx context.Context) error {
	i := w.images
	s := i.disk.State()
	was := *s.Slot(i.running)
	if err := i.disk.Good(i.running); err != nil {
		return err
	}
	w.log.Info("the image is good", "slot", i.running, "version", was.Version, "starts", was.Boots)
	if svc := w.service.Load(); svc != nil && was.Status == slot.Trial {
		svc.Publish(service.Event{
			MessageID: "Update.1.3.UpdateSuccessful", Args: []string{string(i.running), was.Version}, Origin: "/redfish/v1/UpdateService",
		})
	}
	if i.updater == nil {
		return nil
	}
	return i.updater.Settle(ctx)
}

// works asks each part that an agent is of no use without.
func (w *worker) works(ctx context.Context) error {
	if w.cfg.Memory.Backend != config.BackendNone {
		if s := w.engine.State(); s.Phase == engine.NoMemory {
			return errors.New("the window into the host's memory does not open")
		}
	}
	if w.journal == nil {
		return errors.New("the journal does not open")
	}
	if !w.proved {
		if _, err := w.journal.Write("start", map[string]any{"slot": w.images.running}); err != nil {
			return fmt.Errorf("the journal does not write: %w", err)
		}
		w.proved = true
	}
	if err := w.redfishAnswers(ctx); err != nil {
		return fmt.Errorf("the Redfish service does not answer: %w", err)
	}
	return nil
}

// redfishAnswers reads the service's root as a client does, and knows the service by its certificate.
func (w *worker) redfishAnswers(ctx context.Context) error {
	svc := w.service.Load()
	if svc == nil {
		return errors.New("it is not there yet")
	}
	host, port, err := net.SplitHostPort(w.cfg.Redfish.Listen)
	if err != nil {
		return err
	}
	if a, err := netip.ParseAddr(host); host == "" || err == nil && a.IsUnspecified() {
		host = "127.0.0.1"
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+net.JoinHostPort(host, port)+"/redfish/v1/", nil)
	if err != nil {
		return err
	}
	t := &http.Transport{TLSClientConfig: &tls.Config{
		MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, // its certificate is compared with the service's own
		VerifyConnection: func(s tls.ConnectionState) error {
			if !s.PeerCertificates[0].Equal(svc.Certificate()) {
				return errors.New("something else answers in its place")
			}
			return nil
		},
	}}
	defer t.CloseIdleConnections()
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}
