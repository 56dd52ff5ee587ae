package kernels

import (
	"crypto/sha256"
	"fmt"
)

// packageFields are what a Packages file says of a package besides its control fields (Debian repository format).
func packageFields(file string, content []byte) string {
	return fmt.Sprintf("Filename: %s\nSize: %d\nSHA256: %x\n", file, len(content), sha256.Sum256(content))
}

// releaseFile is a Release file that lists one index.
func releaseFile(index string, content []byte) string {
	return fmt.Sprintf("Codename: bookworm\nSuite: oldstable\nArchitectures: arm64\nComponents: main\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n %x %d %s\n",
		sha256.Sum256(content), len(content), index)
}
