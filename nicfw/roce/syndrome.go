package roce

import (
	"fmt"
	"time"
)

// Syndrome is the first byte of the AETH: an acknowledgement with credits, a receiver-not-ready with its timer, or a
// refusal with its reason (IBA section 9.7.5.1.4, table 45 and 46).
type Syndrome uint8

// The syndromes with a meaning of their own.
const (
	AckUnlimited     Syndrome = 0x1f // acknowledged; no end-to-end credits
	rnrBase          Syndrome = 0x20
	NAKSequence      Syndrome = 0x60 // a packet is missing; resend from the PSN of the NAK
	NAKInvalid       Syndrome = 0x61 // invalid request
	NAKRemoteAccess  Syndrome = 0x62 // key, bounds or rights
	NAKRemoteOp      Syndrome = 0x63 // the responder could not complete it
	NAKInvalidRD     Syndrome = 0x64
	syndromeTypeMask Syndrome = 0xe0
	syndromeTypeNAK  Syndrome = 0x60
)

// IsAck reports a positive acknowledgement.
func (s Syndrome) IsAck() bool { return s&syndromeTypeMask == 0 }

// IsRNR reports receiver-not-ready.
func (s Syndrome) IsRNR() bool { return s&syndromeTypeMask == rnrBase }

// IsNAK reports a refusal.
func (s Syndrome) IsNAK() bool { return s&syndromeTypeMask == syndromeTypeNAK }

// String returns the specification's name.
func (s Syndrome) String() string {
	switch {
	case s == AckUnlimited:
		return "ACK"
	case s.IsAck():
		return fmt.Sprintf("ACK, %d credits", s.credits())
	case s.IsRNR():
		return fmt.Sprintf("RNR NAK, %v", s.rnrDelay())
	}
	switch s {
	case NAKSequence:
		return "PSN sequence error"
	case NAKInvalid:
		return "invalid request"
	case NAKRemoteAccess:
		return "remote access error"
	case NAKRemoteOp:
		return "remote operational error"
	case NAKInvalidRD:
		return "invalid RD request"
	}
	return fmt.Sprintf("syndrome %#02x", uint8(s))
}

// NAKError is a request that the responder refused.
type NAKError struct {
	Syndrome Syndrome
	QPN      QPN // the requester's
	PSN      PSN // of the refused packet
}

// Error returns the reason.
func (e *NAKError) Error() string {
	return fmt.Sprintf("refused by the responder: %v (qpn %v, psn %v)", e.Syndrome, e.QPN, e.PSN)
}

// creditCodes are the end-to-end flow control credits by code (IBA table 46); code 31 means none are in use.
var creditCodes = [31]uint16{
	0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192,
	12288, 16384, 24576, 32768,
}

// credits returns the receives that an acknowledgement announces, or -1 if it announces no limit.
func (s Syndrome) credits() int {
	if s&0x1f == 0x1f {
		return -1
	}
	return int(creditCodes[s&0x1f])
}

// ackWithCredits returns the acknowledgement that announces at most n receives.
func ackWithCredits(n int) Syndrome {
	code := 0
	for code+1 < len(creditCodes) && int(creditCodes[code+1]) <= n {
		code++
	}
	return Syndrome(code)
}

// rnrTimers are the receiver-not-ready delays by code, in units of 10 µs (IBA table 45).
var rnrTimers = [32]uint32{
	65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144,
	8192, 12288, 16384, 24576, 32768, 49152,
}

// rnrDelay returns how long the requester must wait.
func (s Syndrome) rnrDelay() time.Duration {
	return time.Duration(rnrTimers[s&0x1f]) * 10 * time.Microsecond
}

// rnrFor returns the receiver-not-ready syndrome with the shortest delay of at least d.
func rnrFor(d time.Duration) Syndrome {
	for code := 1; code < len(rnrTimers); code++ {
		if s := rnrBase | Syndrome(code); s.rnrDelay() >= d {
			return s
		}
	}
	return rnrBase
}

// ackTimeout returns the duration of a 5-bit timeout code: 4.096 µs · 2^code; 0 means without end and is returned so.
func ackTimeout(code uint8) time.Duration {
	if code &= 0x1f; code == 0 {
		return 0
	}
	return time.Duration(4096 << code)
}

// timeoutCode returns the smallest code whose duration is at least d.
func timeoutCode(d time.Duration) uint8 {
	for code := uint8(1); code < 31; code++ {
		if ackTimeout(code) >= d {
			return code
		}
	}
	return 31
}
