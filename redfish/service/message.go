package service

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Error is a refusal: an HTTP status and messages of the Base registry. Functions of routes return one to tell the client what
// is wrong; any other error of theirs becomes an InternalError, with the error's text going to the log only.
type Error struct {
	Status   int
	Messages []schema.Message
	Header   http.Header
	Cause    error // for the log
}

func (e *Error) Error() string {
	var s []string
	for _, m := range e.Messages {
		s = append(s, m.Message)
	}
	if e.Cause != nil {
		s = append(s, e.Cause.Error())
	}
	return strings.Join(s, " ")
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// ErrNotFound says that there is no such resource. The service answers 404 with the URI asked for.
var ErrNotFound = errors.New("resource not found")

// Because returns a refusal with a message of the Base registry, such as "ResourceInUse", and an explanation in words that replaces
// the registry's text: clients show it to people.
func Because(status int, id, explanation string, args ...string) *Error {
	m := message(id, args...)
	if explanation != "" {
		m.Message = explanation
	}
	return &Error{Status: status, Messages: []schema.Message{m}}
}

// refuse returns a refusal with one message of the Base registry.
func refuse(status int, id string, args ...string) *Error {
	return &Error{Status: status, Messages: []schema.Message{message(id, args...)}}
}

// about names the property that the refusal is about, as a JSON pointer.
func (e *Error) about(property string) *Error {
	if property != "" {
		e.Messages[0].RelatedProperties = []string{"#/" + property}
	}
	return e
}

const baseRegistry = "Base.1.22."

// message fills in a message of the Base registry. An id that is not in the table is a programmer's error.
func message(id string, args ...string) schema.Message {
	t, ok := baseMessages[id]
	if !ok || strings.Count(t.text, "%") != len(args) {
		panic(fmt.Sprintf("message %s with %d arguments is not in the table", id, len(args)))
	}
	text := t.text
	for i, arg := range args {
		text = strings.ReplaceAll(text, "%"+strconv.Itoa(i+1), clip(arg))
	}
	clipped := make([]string, len(args))
	for i, arg := range args {
		clipped[i] = clip(arg)
	}
	return schema.Message{
		ODataType: "#" + schema.TypeMessage, MessageID: baseRegistry + id, Message: text, MessageArgs: clipped,
		MessageSeverity: t.severity, Resolution: t.resolution,
	}
}

// updateMessage fills in a message of the Update registry.
func updateMessage(id string, args ...string) schema.Message {
	t, ok := eventMessages["Update."+id]
	if !ok || strings.Count(t.text, "%") != len(args) {
		panic(fmt.Sprintf("message %s with %d arguments is not in the table", id, len(args)))
	}
	m := schema.Message{ODataType: "#" + schema.TypeMessage, MessageID: updateEvent + id, Message: t.text, MessageArgs: []string{}, MessageSeverity: t.severity, Resolution: t.resolution}
	for i, arg := range args {
		m.Message = strings.ReplaceAll(m.Message, "%"+strconv.Itoa(i+1), clip(arg))
		m.MessageArgs = append(m.MessageArgs, clip(arg))
	}
	return m
}

// UpdateRefused returns a refusal with a message of the Update registry, such as "VerificationFailed", and an explanation in words behind
// the registry's text.
func UpdateRefused(status int, id, explanation string, args ...string) *Error {
	m := updateMessage(id, args...)
	m.Message = strings.TrimSpace(m.Message + " " + explanation)
	return &Error{Status: status, Messages: []schema.Message{m}}
}

// clip bounds what an answer repeats of a request.
func clip(s string) string {
	const limit = 200
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}

type registryMessage struct {
	severity   schema.Health
	text       string
	resolution string
}
