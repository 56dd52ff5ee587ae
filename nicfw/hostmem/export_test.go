package hostmem

import (
	"bufio"
	"bytes"
	"crypto/sha256"
)

// ReadBody reads the records of a recording without their compression.
func ReadBody(body []byte) (*Recording, error) {
	return readBody(bufio.NewReader(bytes.NewReader(body)))
}

// Resum returns body with the checksum at its end put right.
func Resum(body []byte) []byte {
	if len(body) < sha256.Size {
		return body
	}
	n := len(body) - sha256.Size
	sum := sha256.Sum256(body[:n])
	return append(body[:n:n], sum[:]...)
}
