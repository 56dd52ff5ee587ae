package roce

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"reflect"
	"strings"
	"time"
)

// Verb is what a work request asks for.
type Verb uint8

// The verbs.
const (
	VerbSend Verb = iota + 1
	VerbWrite
	VerbRead
	VerbCompareSwap
	VerbFetchAdd
	VerbRecv
)

// String returns the field's name of the verb.
func (v Verb) String() string {
	if int(v) < len(verbNames) && v > 0 {
		return verbNames[v]
	}
	return fmt.Sprintf("verb %d", uint8(v))
}

var verbNames = [...]string{VerbSend: "SEND", VerbWrite: "WRITE", VerbRead: "READ", VerbCompareSwap: "CMP_AND_SWP", VerbFetchAdd: "FETCH_AND_ADD", VerbRecv: "RECV"}

// WorkRequest is one thing to do. Buf must not be touched until its completion.
type WorkRequest struct {
	ID      uint64 // returned in the completion
	Verb    Verb
	Buf     []byte // SEND, WRITE: the data. READ, RECV: where they go
	Addr    uint64 // READ, WRITE, atomics: the remote address
	RKey    RKey
	Compare uint64 // CMP_AND_SWP: the value expected
	SwapAdd uint64 // CMP_AND_SWP: the new value. FETCH_AND_ADD: what to add
	Imm     uint32 // SEND, WRITE with HasImm: immediate data
	HasImm  bool
}

// Completion is the outcome of one work request. It succeeded if Err is nil.
type Completion struct {
	ID     uint64
	QPN    QPN
	Verb   Verb
	Len    int    // RECV: bytes received
	Imm    uint32 // RECV: immediate data
	HasImm bool
	Prev   uint64 // atomics: the value found
	Err    error
}

var (
	// ErrRetryExceeded means that the peer did not answer.
	ErrRetryExceeded = errors.New("retry count exceeded: the peer does not answer")
	// ErrRNRRetryExceeded means that the peer had no receive posted, again and again.
	ErrRNRRetryExceeded = errors.New("receiver-not-ready retry count exceeded")
	// ErrFlushed is the outcome of what was waiting when its queue pair failed or was closed.
	ErrFlushed = errors.New("flushed: the queue pair is in error")
	// ErrLength means that a message did not fit into the buffer of its receive.
	ErrLength = errors.New("message longer than the receive buffer")
	// ErrQueueFull means that the work queue has no room; wait for completions.
	ErrQueueFull = errors.New("work queue is full")
	// ErrNotConnected means that the queue pair has no peer yet or any more.
	ErrNotConnected = errors.New("queue pair is not connected")
	// ErrDisconnected means that the peer ended the connection.
	ErrDisconnected = errors.New("the peer disconnected")
	// ErrIdle means that nothing was heard from the peer for the idle timeout.
	ErrIdle = errors.New("idle timeout")
	// ErrRefused is the local end of a request that this side refused; the peer got a NAK.
	ErrRefused = errors.New("refused the peer's request")
)

// QPConfig are the properties of a queue pair. Zero fields take the defaults.
type QPConfig struct {
	PathMTU     int           // payload bytes per packet; default and limit: the link's
	SendDepth   int           // send queue entries; default 128
	RecvDepth   int           // receive queue entries; default 128
	MaxReads    int           // READ and atomic requests that we have outstanding, at most the peer's Resources; default 32
	Resources   int           // READ and atomic requests that the peer may have outstanding; default 32
	Window      int           // packets that we have unacknowledged, or asked for by READs; default 128
	AckTimeout  time.Duration // before a retry, rounded up to 4.096 µs · 2^n; default 67.1 ms
	RetryCount  int           // 1 to 7, -1 for none; default 7
	RNRRetry    int           // 1 to 6, 7 without end, -1 for none; default 7
	MinRNRDelay time.Duration // that we ask for when no receive is posted; default 640 µs
	FlowControl bool          // announce our posted receives as end-to-end credits
	IdleTimeout time.Duration // without a packet from the peer before the queue pair fails; default none
}

// withDefaults fills in zero fields and bounds the others.
func (c QPConfig) withDefaults(linkMTU int) QPConfig {
	def := func(v *int, d, lo, hi int) {
		if *v == 0 {
			*v = d
		}
		*v = min(max(*v, lo), hi)
	}
	mtu := MinPathMTU
	for _, m := range PathMTUs() {
		if m <= linkMTU && (c.PathMTU == 0 || m <= c.PathMTU) {
			mtu = m
		}
	}
	c.PathMTU = mtu
	def(&c.SendDepth, 128, 1, 1<<14)
	def(&c.RecvDepth, 128, 1, 1<<14)
	def(&c.MaxReads, 32, 1, 255)
	def(&c.Resources, 32, 1, 255)
	def(&c.Window, 128, 2, 1<<14)
	def(&c.RetryCount, 7, -1, 7)
	def(&c.RNRRetry, 7, -1, 7)
	c.RetryCount, c.RNRRetry = max(c.RetryCount, 0), max(c.RNRRetry, 0)
	if c.AckTimeout == 0 {
		c.AckTimeout = ackTimeout(14)
	}
	c.AckTimeout = ackTimeout(timeoutCode(c.AckTimeout))
	if c.MinRNRDelay == 0 {
		c.MinRNRDelay = 640 * time.Microsecond
	}
	return c
}

// Remote is the other end of a connection, as the two sides tell each other by connection management, by a lease or by
// any other means.
type Remote struct {
	Addr netip.Addr
	QPN  QPN
	PSN  PSN // of the first packet that the peer sends
}

// Limits bound what peers can make a device do or keep. Zero fields take the defaults.
type Limits struct {
	QPsPerPeer      int   // queue pairs per address; default 64
	QPs             int   // in all; default 1024
	HalfOpenPerPeer int   // connection requests not yet established, per address; default 16
	HalfOpen        int   // in all; default 128
	MaxRead         int64 // bytes that one READ may ask for; default 64 MiB
	BytesPerSecond  int64 // of READ responses per address, first and repeated ones; default no limit
	// ReplayBytesPerSecond is of repeated READ responses per address: what forged duplicates can make us send. Default
	// 128 MiB; negative is no limit.
	ReplayBytesPerSecond int64
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.QPsPerPeer, 64)
	def(&l.QPs, 1024)
	def(&l.HalfOpenPerPeer, 16)
	def(&l.HalfOpen, 128)
	if l.MaxRead <= 0 {
		l.MaxRead = 64 << 20
	}
	if l.ReplayBytesPerSecond == 0 {
		l.ReplayBytesPerSecond = 128 << 20
	}
	return l
}

// ErrLimit is wrapped by errors about a limit that was reached.
var ErrLimit = errors.New("limit reached")

// Counters count what a device received, sent and refused since it was opened.
type Counters struct {
	Received, Sent                                                uint64 // packets
	Malformed, UnknownQPN, WrongSource, BadPKey, BadState         uint64 // received and dropped
	UnknownDuplicate, BadResponse, StaleResponse                  uint64 // received and dropped
	Duplicates, OutOfOrder, Congestion                            uint64 // received
	NAKSequence, NAKInvalid, NAKAccess, NAKOperation, RNR         uint64 // sent
	BadKey, BadBounds, BadRights, Revoked                         uint64 // reasons of NAKAccess
	Replays, ReplayedPackets                                      uint64 // duplicate READs answered
	Retries, Timeouts, NAKsReceived, RNRsReceived                 uint64 // as a requester
	CMReceived, CMSent, CMMalformed, CMUnmatched, CMDropped       uint64
	ConnectionsRefused, ConnectionsEstablished, ConnectionsFailed uint64
	ConnectionsNotAllowed                                         uint64 // of those refused: by Listener.Allow
	Throttled                                                     uint64 // times that READ responses waited under BytesPerSecond or ReplayBytesPerSecond
}

// All yields the counters by name.
func (c Counters) All() iter.Seq2[string, uint64] {
	return func(yield func(string, uint64) bool) {
		v := reflect.ValueOf(c)
		for i := range v.NumField() {
			if !yield(v.Type().Field(i).Name, v.Field(i).Uint()) {
				return
			}
		}
	}
}

// String returns those that are not zero.
func (c Counters) String() string {
	var b strings.Builder
	for name, n := range c.All() {
		if n != 0 {
			fmt.Fprintf(&b, " %s=%d", name, n)
		}
	}
	return strings.TrimPrefix(b.String(), " ")
}
