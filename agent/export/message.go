package export

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
)

// A message of the action queue pair is one SEND of at most MaxMessage bytes: version 1, type, flags 2 (1: more of it follows in
// the next message with the same number), number 4, then a piece of a JSON document; little endian. The number is the monitor's,
// and answers bear that of their request. A request is one message. Its answers are any number of progress reports and one
// result or error; each may be cut into messages.
const (
	MaxMessage = 16 << 10

	messageHead = 8
	flagMore    = 1
	// maxResult bounds a document that is put together from messages.
	maxResult = 4 << 20
	// actionDepth is how many messages each side can take at once.
	actionDepth = 16
	// maxRunning is how many requests a monitor has under way on one connection; the agent takes twice as many, for those that
	// break others off.
	maxRunning = 4
)

type messageType uint8

const (
	typeRequest messageType = 1 + iota
	typeProgress
	typeResult
	typeError
)

// message is one message; its data is part of the buffer that it was parsed from.
type message struct {
	typ  messageType
	more bool
	num  uint32
	data []byte
}

var errMessage = errors.New("no message of the action queue pair")

func parseMessage(b []byte) (message, error) {
	if len(b) < messageHead || len(b) > MaxMessage || b[0] != 1 || b[1] < byte(typeRequest) || b[1] > byte(typeError) {
		return message{}, errMessage
	}
	flags := binary.LittleEndian.Uint16(b[2:])
	if flags&^flagMore != 0 {
		return message{}, fmt.Errorf("%w: flags %#x", errMessage, flags)
	}
	return message{messageType(b[1]), flags&flagMore != 0, binary.LittleEndian.Uint32(b[4:]), b[messageHead:]}, nil
}

func (m message) bytes() []byte {
	b := []byte{1, byte(m.typ), 0, 0}
	if m.more {
		b[2] = flagMore
	}
	return append(binary.LittleEndian.AppendUint32(b, m.num), m.data...)
}

// split cuts a document into messages.
func split(typ messageType, num uint32, doc []byte) (out []message) {
	const piece = MaxMessage - messageHead
	for len(doc) > piece {
		out = append(out, message{typ, true, num, doc[:piece]})
		doc = doc[piece:]
	}
	return append(out, message{typ, false, num, doc})
}

// The operations that can be asked for, with what they take and give.
const (
	OpState    = "state"    // → engine.State
	OpFindings = "findings" // → []detect.Finding, open ones and behind them the latest resolved ones
	OpJournal  = "journal"  // JournalRequest → JournalReply
	OpHeal     = "heal"     // HealRequest → HealReply; progress reports tell how it goes
	OpUndo     = "undo"     // UndoRequest → HealReply: takes back a finished repair; progress reports tell how it goes
	OpBreakOff = "break"    // BreakOffRequest: breaks off what this connection has begun and what is under way, which takes back what it stored
	OpRestore  = "restore"  // RestoreRequest → heal.Outcome: takes back a store that a peer made by WRITE or by an atomic operation
	OpPower    = "power"    // PowerRequest
)

// request is the document of a request.
type request struct {
	Op   string          `json:"op"`
	Args json.RawMessage `json:"args,omitempty"`
}

// HealRequest asks for a repair of a finding. The agent plans it anew, on what the host's memory holds at that moment.
type HealRequest struct {
	Finding string `json:"finding"`
	Action  string `json:"action,omitempty"` // empty is what policy proposes
	DryRun  bool   `json:"dryRun,omitempty"` // plan only
	// Value is what the action is given, if it takes a value; absent is what policy gives it.
	Value *heal.Value `json:"value,omitempty"`
	// Plan, if given, is the plan that somebody has agreed to: the repair is refused unless the fresh one does the same to the
	// same target. What Agreed leaves of a plan is enough.
	Plan *heal.Plan `json:"plan,omitempty"`
}

// Agreed returns what of a plan counts when it is carried out, which is what its digest is of. It fits into a request, which is one
// message.
func Agreed(p heal.Plan) *heal.Plan {
	a := &heal.Plan{ID: p.ID, Action: p.Action, Finding: p.Finding, Title: p.Title, Risk: p.Risk, Made: p.Made, Target: p.Target, Targets: p.Targets, More: p.More, Value: p.Value, TakesBack: p.TakesBack, Steps: []heal.Step{}}
	for _, s := range p.Steps {
		a.Steps = append(a.Steps, heal.Step{Op: s.Op, Object: s.Object, Power: s.Power, Network: s.Network})
	}
	return a
}

// UndoRequest asks for the latest repair of a finding, open or resolved, to be taken back, as engine.UndoRequest does.
type UndoRequest struct {
	Finding string     `json:"finding"`
	DryRun  bool       `json:"dryRun,omitempty"` // plan only
	Plan    *heal.Plan `json:"plan,omitempty"`   // as of HealRequest
}

// HealReply is what came of it. The outcome is absent if nothing was begun.
type HealReply struct {
	Plan    *heal.Plan    `json:"plan,omitempty"`
	Outcome *heal.Outcome `json:"outcome,omitempty"`
}

// BreakOffRequest names the request to break off.
type BreakOffRequest struct {
	Number uint32 `json:"number"`
}

// RestoreRequest names a record of the journal of kind RecordStore. What was there before is put back if what the store put is
// still there; else nothing is stored. It goes through the executor, as a repair does, with records of its own.
type RestoreRequest struct {
	Record uint64 `json:"record"`
}

// PowerRequest is an order about the host's power: "on", "off", "cycle", "nmi", "shutdown" or an order of package heal.
type PowerRequest struct {
	Op string `json:"op"`
}

// JournalRequest asks for records from a number on, and acknowledges those up to another.
type JournalRequest struct {
	From uint64 `json:"from"`
	Have uint64 `json:"have,omitempty"` // all records up to this one have been kept by the monitor
	Max  int    `json:"max,omitempty"`  // records; default and limit 500
}

// JournalReply holds records in order. Damaged or overwritten ones are missing; a gap in Seq tells which.
type JournalReply struct {
	Restart uint64           `json:"restart"` // of the journal: marks its opening
	Head    uint64           `json:"head"`    // number of the newest record
	Hash    string           `json:"hash"`    // of the newest record
	Have    uint64           `json:"have"`    // what this user has acknowledged
	Records []journal.Record `json:"records"`
}

// progress is the document of a progress report.
type progress struct {
	At   time.Time `json:"at"`
	Text string    `json:"text"`
}

// ActionError is a refused or failed request.
type ActionError struct {
	Code string `json:"code"` // "denied", "busy", "not-found", "not-attached", "invalid", "stale", "failed"
	Text string `json:"text"`
}

func (e *ActionError) Error() string { return e.Text }

// Findings are the answer to OpFindings.
type Findings []detect.Finding
