//go:build !backdoor_lab

package main

import (
	"context"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// serveLab does nothing: agents outside of laboratories serve nobody without a lease.
func serveLab(context.Context, *worker, *roce.Device) (stop func()) { return func() {} }
