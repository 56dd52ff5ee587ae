package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

var goodLine = regexp.MustCompile(`msg="the image is good"`)

// start measures how long the DPU takes from power on, while the host idles: as QEMU starts its image, and through the whole chain, by
// the loader from a slot, until it has attested.
func start(ctx context.Context, r *report, o options) error {
	for _, slots := range []bool{false, true} {
		if err := starts(ctx, r, o, slots); err != nil {
			return err
		}
	}
	return nil
}

func starts(ctx context.Context, r *report, o options, slots bool) error {
	l, err := lab.Up(ctx, lab.Config{HostKernel: o.kernel, Slots: slots, Log: r.log})
	if err != nil {
		return err
	}
	defer l.Close()
	way := "its image alone"
	if slots {
		way = "loader and slot"
	}
	r.add("DPU, "+way+": first start to Redfish", "ms", "harness: from the start of QEMU; the host boots, too, and the state disk is empty", ms(l.DPU.BootTook)...)
	if err := tell(ctx, r, l.DPU, way, "first start: "); err != nil {
		return err
	}
	var answered, proved []time.Duration
	for i := range o.n {
		if slots { // the start before must have been good
			if _, err := l.DPU.Console().Wait(ctx, l.DPU.StartMark(), goodLine); err != nil {
				return err
			}
		}
		if err := l.DPU.Restart(ctx); err != nil {
			return err
		}
		answered = append(answered, l.DPU.BootTook)
		if slots {
			took, err := prove(ctx, l.DPU)
			if err != nil {
				return err
			}
			proved = append(proved, took)
		}
		if i == o.n-1 {
			if err := tell(ctx, r, l.DPU, way, ""); err != nil {
				return err
			}
		}
	}
	const how = "harness: from the start of QEMU; the host idles"
	r.add("DPU, "+way+": power on to Redfish", "ms", how, ms(answered...)...)
	r.add("DPU, "+way+": power on to attested", "ms", how+"; quote, event log and image verified", ms(proved...)...)
	return nil
}

// tell reports the steps of a start.
func tell(ctx context.Context, r *report, d *lab.DPU, way, when string) error {
	for _, s := range d.StartSteps() {
		r.add("DPU, "+way+": "+when+s.Name, "ms", fmt.Sprintf("agent's own: ended %v after its kernel's start", s.At), ms(s.Took)...)
	}
	return ctx.Err()
}

// prove has the DPU prove that it runs the image of its bundle, and returns how long that took since its start. The keys are taken as they are: it is
// the lab's own TPM.
func prove(ctx context.Context, d *lab.DPU) (time.Duration, error) {
	c, err := d.Redfish()
	if err != nil {
		return 0, err
	}
	defer c.Close(ctx)
	first, _ := c.Attest(ctx, client.Attestation{}) // trusts no key, and tells them
	if first == nil {
		return 0, errors.New("the DPU does not tell the keys of its TPM")
	}
	image, err := d.Slots.Image(d.Slots.Bundle)
	if err != nil {
		return 0, err
	}
	if _, err := c.Attest(ctx, client.Attestation{Policy: attest.Policy{Keys: []attest.Digest{first.AttestationKey}, Images: []attest.Image{image}}}); err != nil {
		return 0, err
	}
	return time.Since(d.Started()), nil
}
