package engine

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// foresee has the finding's detectors judge the host's memory as it would be with a plan's stores made, of which none is: a copy of
// the pages that they read, with the stores in it. It says what heal.Plan.Foreseen is to say. Detectors that need a longer row than
// two looks cannot tell.
func (e *Engine) foresee(ctx context.Context, img *kernel.Image, f detect.Finding, p heal.Plan) string {
	stores := p.Stores()
	if img == nil || len(stores) == 0 || f.Kind != detect.KindTampering && f.Kind != detect.KindExhaustion {
		return ""
	}
	pass := detect.Pass{Now: time.Now()}
	for range 2 {
		v := img.ViewAs(ctx, stores)
		signs, err := v.Signs()
		if err != nil {
			return heal.ForeseenCannot + err.Error()
		}
		usage, err := v.Usage()
		if err != nil {
			return heal.ForeseenCannot + err.Error()
		}
		pass.Signs, pass.Usage, pass.View = append(pass.Signs, signs), append(pass.Usage, usage), v
	}
	for _, c := range f.Changes {
		now := make([]byte, len(c.Now))
		if err := pass.View.ReadVirt(c.Addr, now); err != nil {
			return heal.ForeseenCannot + err.Error()
		}
		if len(c.Was) == 0 || !bytes.Equal(now, c.Was) {
			c.Now = now
			pass.Changes = append(pass.Changes, c)
		}
	}
	pass.Now = time.Now()
	for _, d := range e.detectors {
		if d.Kind != f.Kind || slices.ContainsFunc(d.Needs, func(n detect.Need) bool { return n != detect.NeedSigns && n != detect.NeedUsage }) {
			continue // what it judges by are no stores of a plan
		}
		found, err := d.Detect(ctx, &pass)
		if err != nil {
			return fmt.Sprintf("%s%s: %v", heal.ForeseenCannot, d.ID, err)
		}
		for _, x := range found {
			if x.Key == f.Key {
				return heal.ForeseenStands
			}
		}
	}
	return heal.ForeseenQuiet
}
