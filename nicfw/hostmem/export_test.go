package hostmem

import "crypto/sha256"

// Resum returns body with the checksum at its end put right.
func Resum(body []byte) []byte {
	if len(body) < sha256.Size {
		return body
	}
	n := len(body) - sha256.Size
	sum := sha256.Sum256(body[:n])
	return append(body[:n:n], sum[:]...)
}
