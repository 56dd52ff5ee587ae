package principles

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptrace"
	"runtime"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// percentile returns the p-th of the values, which it sorts.
func percentile(all []time.Duration, p int) time.Duration {
	slices.Sort(all)
	return all[min(len(all)*p/100, len(all)-1)]
}

// serving asks the agent's two services n times each, and returns how long the answers took. What is lost on the way is asked for again, as
// RoCEv2 does; that is in the time of the answer.
func (b *bench) serving(ctx context.Context, n int) (redfish, rdma []time.Duration, err error) {
	p, err := b.health(ctx)
	if err != nil {
		return nil, nil, err
	}
	for range n {
		began := time.Now()
		var s schema.ComputerSystem
		if err := b.agent.Get(ctx, "/redfish/v1/Systems/system", &s); err != nil {
			return nil, nil, fmt.Errorf("no answer of Redfish: %w", err)
		}
		redfish = append(redfish, time.Since(began))
		for range 5 {
			began = time.Now()
			for tries := 0; ; tries++ {
				if _, err := p.Health(ctx); err == nil {
					break
				} else if tries == 3 {
					return nil, nil, fmt.Errorf("no answer of the health page: %w", err)
				}
			}
			rdma = append(rdma, time.Since(began))
		}
	}
	return redfish, rdma, nil
}

// floods has the host send as fast as it can until stop is called, which returns how many frames a second went out.
func (b *bench) floods(ctx context.Context) (stop func() (float64, error)) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	began, sent := time.Now(), 0
	go func() {
		frame := eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(9, 9, "flood")))
		for ctx.Err() == nil {
			r, err := b.host.Frames(context.WithoutCancel(ctx), control.FramesArgs{Frames: [][]byte{frame}, For: time.Second})
			if err != nil {
				done <- err
				return
			}
			sent += r.Sent
		}
		done <- nil
	}()
	return func() (float64, error) {
		cancel()
		err := <-done
		return float64(sent) / time.Since(began).Seconds(), err
	}
}

// answersUnderFlood measures how long the agent's answers take while its host is idle, while the host computes on all its CPUs without sending
// anything, and while it sends as fast as it can. Host and DPU have a CPU of this machine each, as they have processors of their own: without
// that the host takes the time of the DPU's emulation, as no host can.
func answersUnderFlood(ctx context.Context, b *bench) (string, error) {
	if runtime.NumCPU() >= 2 {
		if err := errors.Join(b.host.Pin(0), b.lab.DPU.Pin(1)); err != nil {
			return "", err
		}
		defer func() { _ = errors.Join(b.host.Pin(), b.lab.DPU.Pin()) }()
	}
	const n = 100
	said := ""
	for _, load := range []struct {
		name  string
		start func() (stop func() (string, error), err error)
	}{
		{"idle", func() (func() (string, error), error) { return func() (string, error) { return "", nil }, nil }},
		{"computing", func() (func() (string, error), error) {
			if _, err := b.host.Exec(ctx, "for i in 1 2; do (while :; do :; done) & echo $! >>/tmp/busy; done"); err != nil {
				return nil, err
			}
			return func() (string, error) {
				_, err := b.host.Exec(ctx, "kill $(cat /tmp/busy); rm /tmp/busy")
				return "", err
			}, nil
		}},
		{"flooding", func() (func() (string, error), error) {
			stop := b.floods(ctx)
			return func() (string, error) {
				rate, err := stop()
				return fmt.Sprintf(" (%.0f frames/s)", rate), err
			}, nil
		}},
	} {
		stop, err := load.start()
		if err != nil {
			return "", err
		}
		ran, waited, err := b.lab.DPU.Scheduled()
		if err != nil {
			return "", err
		}
		redfish, rdma, err := b.serving(ctx, n)
		ran2, waited2, werr := b.lab.DPU.Scheduled()
		err = errors.Join(err, werr)
		more, serr := stop()
		if err := errors.Join(err, serr); err != nil {
			return "", fmt.Errorf("while the host is %s: %w", load.name, err)
		}
		ms := func(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Microseconds())/1000) }
		said += fmt.Sprintf("%s%s: Redfish %s/%s ms, health page %s/%s ms (the DPU's emulator ran %.1f s and waited %.1f s for a CPU); ", load.name, more,
			ms(percentile(redfish, 50)), ms(percentile(redfish, 99)), ms(percentile(rdma, 50)), ms(percentile(rdma, 99)), (ran2 - ran).Seconds(), (waited2 - waited).Seconds())
	}
	return "p50/p99 " + said, nil
}

// sentAt notes when a request has been sent, after whatever it took to have a connection.
func sentAt(ctx context.Context, at *time.Time) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { *at = time.Now() }})
}
