package principles

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// bounded has an agreement give all detectors but one, and a quarantine twice within a time. A scan is not judged then, and the third quarantine is refused: what
// the host sends comes out on the wire. What is planted is an agreement without these bounds.
func bounded(ctx context.Context, b *bench) (_ string, err error) {
	const (
		most    = 2
		within  = 40 * time.Second
		without = "network-scan" // which finds the scan below within 5 to 6 s
	)
	st, err := b.agent.State(ctx)
	if err != nil {
		return "", err
	}
	was := b.held.Rights
	if err := b.succeed(ctx, "bounded", func(a *access.Agreement) {
		if b.calm {
			return
		}
		for _, d := range st.Detectors {
			if d.ID != without {
				a.Rights.Detectors = append(a.Rights.Detectors, d.ID)
			}
		}
		a.Rights.Rates = []access.Rate{{Action: "quarantine", Most: most, Within: int(within / time.Second)}}
	}); err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, b.succeed(context.WithoutCancel(ctx), "lab-unbounded", func(a *access.Agreement) { a.Rights = was }))
	}()

	// While the quarantines that other rows have begun grow old, the host scans.
	old := time.Now().Add(within)
	before, err := b.agent.Findings(ctx)
	if err != nil {
		return "", err
	}
	vary := 14 + 20 + 2 // TCP's port
	if b.calm {
		vary = 14 + 18 // the address: the conversations with those ports have been seen
	}
	stop := b.scans(ctx, vary, false)
	f, err := b.newFinding(ctx, 20*time.Second, before, func(f detect.Finding) bool { return f.Kind == detect.KindNetworkScan && f.Resolved == nil })
	if serr := stop(); serr != nil {
		return "", serr
	}
	judged := err == nil
	if judged && !b.calm {
		return "", fmt.Errorf("a detector that the agreement does not give has found: %s", f.Title)
	}
	if st, err = b.agent.State(ctx); err != nil {
		return "", err
	}
	var withheld []string
	for _, d := range st.Detectors {
		if d.Withheld {
			withheld = append(withheld, d.ID)
		}
	}
	if !b.calm && !slices.Equal(withheld, []string{without}) {
		return "", fmt.Errorf("the agreement withholds %s, and the agent says that it withholds %v", without, withheld)
	}
	select {
	case <-ctx.Done():
		return "", context.Cause(ctx)
	case <-time.After(time.Until(old)):
	}

	began := time.Now()
	var refused error
	for n := range most + 1 {
		_, refused = b.order(ctx, client.NetworkOrder{Do: client.NetworkQuarantine, Seconds: 60})
		if n < most && refused != nil {
			return "", fmt.Errorf("quarantine %d of %d: %w", n+1, most, refused)
		}
		if refused == nil {
			if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
				return "", err
			}
		}
	}
	var answer *client.Error
	switch {
	case b.calm && !(judged && refused == nil): // both bounds must be missed for the row to turn red
		return fmt.Sprintf("scan judged: %v, last quarantine: %v", judged, refused), nil
	case refused == nil:
		return "", fmt.Errorf("%d quarantines are done within %v", most+1, time.Since(began).Round(time.Millisecond))
	case !errors.As(refused, &answer) || answer.Status != http.StatusForbidden:
		return "", fmt.Errorf("the quarantine beyond the rate is not refused, but: %w", refused)
	}
	const text = "not kept back"
	mark := b.peer.mark()
	if _, err := b.host.Frames(ctx, control.FramesArgs{Frames: [][]byte{eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(9, 9, text)))}}); err != nil {
		return "", err
	}
	if _, err := b.peer.wait(ctx, mark, carries(text)); err != nil {
		return "", fmt.Errorf("what the host sends is kept back after the refusal: %w", err)
	}
	if _, err := b.agent.WaitState(ctx, "the host to be judged still", func(s engine.State) bool { return s.Passes > st.Passes }); err != nil {
		return "", err
	}
	return fmt.Sprintf("a scan of 20 s is not judged, and the detector is shown as withheld; %d quarantines within %v, the next refused: %v", most, within, refused), nil
}
