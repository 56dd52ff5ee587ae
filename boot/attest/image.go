package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// The PCRs that are used; the numbers are those that systemd gives to the same things.
const (
	// ImagePCR has what the loader has verified, loaded and is about to start (PCR 11, "kernel-boot").
	ImagePCR = 11
	// IdentityPCR has the agent's TLS key and the access agreement that it obeys (PCR 15, "system-identity").
	IdentityPCR = 15
)

// An Image is what a loader measures of an image before it starts it.
type Image struct {
	// Manifest is the signed text that says what the image is.
	Manifest []byte
	// Parts are what was loaded: kernel, initramfs, command line.
	Parts []Part
}

// A Part is one thing that is loaded.
type Part struct {
	Name   string // "kernel", "initrd", "cmdline", "dtb"
	SHA256 Digest
}

const (
	manifestTag = "backdoor manifest\n"
	partTag     = "backdoor part "
	tlsTag      = "backdoor tls "
	agreedTag   = "backdoor agreement "
)

// Events are what is measured into [ImagePCR] when the image is started, in order.
func (i Image) Events() Log {
	l := Log{{PCR: ImagePCR, Type: EventIPL, Digest: sha256.Sum256(i.Manifest), Data: append([]byte(manifestTag), i.Manifest...)}}
	for _, p := range i.Parts {
		l = append(l, Event{PCR: ImagePCR, Type: EventIPL, Digest: p.SHA256, Data: []byte(partTag + p.Name)})
	}
	return l
}

// PCR is the value of [ImagePCR] when the image runs.
func (i Image) PCR() Digest { return i.Events().Replay(ImagePCR) }

// Image returns what the log says was started. It is worth as much as the log: call it on one that a quote confirms.
func (l Log) Image() (Image, bool) {
	var i Image
	for _, e := range l {
		if e.PCR != ImagePCR || e.Type != EventIPL {
			continue
		}
		if m, ok := bytes.CutPrefix(e.Data, []byte(manifestTag)); ok {
			// The text is the log's, the digest the PCR's: only together are they a measurement.
			if i.Manifest != nil || Digest(sha256.Sum256(m)) != e.Digest {
				return Image{}, false
			}
			i.Manifest = m
		} else if name, ok := strings.CutPrefix(string(e.Data), partTag); ok {
			i.Parts = append(i.Parts, Part{name, e.Digest})
		}
	}
	return i, i.Manifest != nil
}

// TLSEvent says that the agent's service shows the key with that SHA-256 of its SubjectPublicKeyInfo.
func TLSEvent(spki Digest) Event {
	text := []byte(tlsTag + spki.String())
	return Event{PCR: IdentityPCR, Type: EventTag, Digest: sha256.Sum256(text), Data: text}
}

// AgreementEvent says that the agent obeys the access agreement with that digest; the zero digest says that it obeys none.
func AgreementEvent(digest Digest) Event {
	text := []byte(agreedTag + digest.String())
	return Event{PCR: IdentityPCR, Type: EventTag, Digest: sha256.Sum256(text), Data: text}
}

// TLSKey returns the SHA-256 of the SubjectPublicKeyInfo that the log names last.
func (l Log) TLSKey() (spki Digest, ok bool) { return l.last(tlsTag) }

// Agreement returns the digest of the access agreement that the log names last.
func (l Log) Agreement() (digest Digest, ok bool) { return l.last(agreedTag) }

// last returns the digest of the latest event about the agent's identity that begins with a tag.
func (l Log) last(tag string) (d Digest, ok bool) {
	for _, e := range l {
		text, is := bytes.CutPrefix(e.Data, []byte(tag))
		if e.PCR != IdentityPCR || !is || Digest(sha256.Sum256(e.Data)) != e.Digest || hex.DecodedLen(len(text)) != len(d) {
			continue
		}
		var this Digest
		if _, err := hex.Decode(this[:], text); err == nil {
			d, ok = this, true
		}
	}
	return d, ok
}
