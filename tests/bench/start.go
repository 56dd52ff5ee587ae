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
	var want client.Attestation
	if slots {
		if want, err = known(ctx, l.DPU); err != nil {
			return err
		}
	}
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
			took, err := prove(ctx, l.DPU, want)
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

// known is what a monitor knows of the DPU: its TPM's key, taken as it is shown, for it is the lab's own, and the image of its bundle.
func known(ctx context.Context, d *lab.DPU) (client.Attestation, error) {
	var want client.Attestation
	c, err := d.Redfish()
	if err != nil {
		return want, err
	}
	defer c.Close(ctx)
	got, _ := c.Attest(ctx, want) // trusts no key, and tells them
	if got == nil {
		return want, errors.New("the DPU does not tell the keys of its TPM")
	}
	image, err := d.Slots.Image(d.Slots.Bundle)
	want.Policy = attest.Policy{Keys: []attest.Digest{got.AttestationKey}, Images: []attest.Image{image}}
	return want, err
}

// prove has the DPU prove that it runs the image of its bundle, to a monitor that logs in, and returns how long that took since its start.
func prove(ctx context.Context, d *lab.DPU, want client.Attestation) (time.Duration, error) {
	c, err := d.Redfish()
	if err != nil {
		return 0, err
	}
	defer c.Close(ctx)
	if _, err := c.Attest(ctx, want); err != nil {
		return 0, err
	}
	return time.Since(d.Started()), nil
}
