package access

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A mailbox is how the host hands an agreement to an agent that holds none yet: a program on the host has the document in its memory, at a
// fixed address, where the agent reads it. It is nothing but a carrier, as a file or Redfish are; what counts are the signatures in the
// document. An agent looks for one only before it has ever locked an agreement.
//
// Layout, little-endian: 24 bytes of mailboxMagic, the document's length in 8 bytes, its SHA-256 in 32, the document.
const (
	// MailboxComm is the name of the program's process, as the kernel has it.
	MailboxComm = "backdoor-agree"
	// MailboxAddress is a virtual address that programs of all hosts with 64 bits have free, those with 39 bits of addresses among them.
	MailboxAddress = 0x20_0000_0000
	// MailboxSize bounds a mailbox, in bytes.
	MailboxSize = mailboxHeader + maxDocument

	mailboxMagic  = "backdoor agreement box 1"
	mailboxHeader = len(mailboxMagic) + 8 + sha256.Size
)

// ErrNoMailbox means that there is no whole document at the address, which may still come.
var ErrNoMailbox = errors.New("no mailbox with an access agreement")

// Mailbox returns what a mailbox with the document holds.
func Mailbox(document []byte) ([]byte, error) {
	if len(document) == 0 || len(document) > maxDocument {
		return nil, fmt.Errorf("mailbox: a document of %d bytes; want 1 to %d: %w", len(document), maxDocument, ErrInvalid)
	}
	b := binary.LittleEndian.AppendUint64([]byte(mailboxMagic), uint64(len(document)))
	sum := sha256.Sum256(document)
	return append(append(b, sum[:]...), document...), nil
}

// ReadMailbox reads the document of the mailbox at an address of the process whose memory it is given.
func ReadMailbox(process io.ReaderAt, address int64) ([]byte, error) {
	h := make([]byte, mailboxHeader)
	if _, err := process.ReadAt(h, address); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoMailbox, err)
	}
	magic, length, sum := h[:len(mailboxMagic)], binary.LittleEndian.Uint64(h[len(mailboxMagic):]), h[len(mailboxMagic)+8:]
	if string(magic) != mailboxMagic {
		return nil, fmt.Errorf("%w: something else is there", ErrNoMailbox)
	}
	if length == 0 || length > maxDocument {
		return nil, fmt.Errorf("mailbox: a document of %d bytes; want 1 to %d: %w", length, maxDocument, ErrInvalid)
	}
	doc := make([]byte, length)
	if _, err := process.ReadAt(doc, address+int64(mailboxHeader)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoMailbox, err)
	}
	if got := sha256.Sum256(doc); !bytes.Equal(got[:], sum) {
		return nil, fmt.Errorf("%w: it is being written, or damaged", ErrNoMailbox)
	}
	return doc, nil
}
