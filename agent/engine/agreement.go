package engine

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Obey carries out a signed order about the access agreement, whoever brought it. What was permitted before and no longer is ends at
// once: each step of a repair asks anew.
func (e *Engine) Obey(o *access.Order, caller string) error {
	err := e.o.Agreement.Obey(o)
	e.agreed("order", fmt.Sprintf("order %d to %s (%q)", o.Sequence, o.Order, o.Reason), caller, o, err)
	return err
}

// Offer has the engine take an access agreement, as access.Lock.Offer says.
func (e *Engine) Offer(a *access.Agreement, caller string) error {
	err := e.o.Agreement.Offer(a)
	e.agreed("agreement", "agreement "+a.ID, caller, a, err)
	return err
}

// agreed journals and announces a change of the agreement, or an attempt at one.
func (e *Engine) agreed(kind, what, caller string, document any, err error) {
	text := what + " was taken"
	entry := map[string]any{"caller": caller, "document": document}
	if err != nil {
		text = what + " was refused: " + err.Error()
		entry["error"] = err.Error()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.record(kind, entry)
	e.publish(Event{Type: EventAgreement, Text: text})
}

// mailboxEvery is the least time between two looks for a mailbox, refusedEvery that after one whose document was not taken. That is logged
// and not journalled: the host must not fill the journal.
const (
	mailboxEvery = time.Second
	refusedEvery = 30 * time.Second
)

// lookForMailbox takes the agreement that the host's part in it holds for an agent that has none. Once there is one, whatever the host puts
// into its memory is looked at no more: the host has no say any longer.
func (w *watcher) lookForMailbox(v *kernel.View, tasks []kernel.Task, now time.Time) {
	e := w.e
	if !e.o.Mailbox || e.o.Agreement == nil || v == nil || now.Before(w.nextMailbox) || e.o.Agreement.Agreement() != nil {
		return
	}
	w.nextMailbox = now.Add(mailboxEvery)
	for _, t := range tasks {
		if t.Comm != access.MailboxComm || t.UID != 0 || t.PID != t.TGID || t.KThread {
			continue
		}
		mem, err := v.UserMemory(t.PID)
		if err != nil {
			continue // it ends, or begins
		}
		if err := w.takeFrom(mem, t.PID); err != nil {
			if !errors.Is(err, access.ErrNoMailbox) {
				w.nextMailbox = now.Add(refusedEvery)
				e.log.Warn("the document in the host's mailbox is not taken", "pid", t.PID, "err", err)
			}
			continue
		}
		e.log.Info("locked the access agreement from the host's mailbox", "pid", t.PID, "agreement", e.o.Agreement.Agreement().ID)
		return
	}
}

// takeFrom offers the document in a process's mailbox to the lock.
func (w *watcher) takeFrom(process io.ReaderAt, pid int) error {
	e := w.e
	doc, err := access.ReadMailbox(process, access.MailboxAddress)
	if err != nil {
		return err
	}
	a, err := access.Parse(bytes.NewReader(doc))
	if err != nil {
		return err
	}
	if e.o.HostUUID != "" && !strings.EqualFold(a.Host.UUID, e.o.HostUUID) {
		return fmt.Errorf("agreement %s is about host %s, and this is %s: %w", a.ID, a.Host.UUID, e.o.HostUUID, access.ErrDenied)
	}
	if err := e.o.Agreement.Offer(a); err != nil {
		return err
	}
	e.agreed("agreement", "agreement "+a.ID, fmt.Sprintf("the host's mailbox, process %d", pid), a, nil)
	return nil
}
