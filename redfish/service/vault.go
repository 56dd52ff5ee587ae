package service

import (
	"os"

	"github.com/backdoor-rhs/backdoor/internal/durable"
)

// A Vault keeps private keys where they are stored such that others than this service on this machine cannot use them.
type Vault interface {
	Seal(plain []byte) ([]byte, error)
	// Open is the reverse. What was never sealed comes back as it is, with wasSealed false: it is from before there was a vault.
	Open(stored []byte) (plain []byte, wasSealed bool, err error)
}

// A vaultError says that a key is there, but that the vault does not open it: for now, not for ever.
type vaultError struct{ error }

func (e vaultError) Unwrap() error { return e.error }

// readKey reads a file with a private key.
func (o *Options) readKey(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil || o.Vault == nil {
		return b, err
	}
	plain, wasSealed, err := o.Vault.Open(b)
	if err != nil {
		return nil, vaultError{err}
	}
	if !wasSealed {
		if err := o.writeKey(path, plain); err != nil {
			o.Logger.Error("seal a private key", "file", path, "err", err)
		}
	}
	return plain, nil
}

// writeKey writes a file with a private key.
func (o *Options) writeKey(path string, plain []byte) error {
	if o.Vault == nil {
		return durable.WriteFile(path, plain, 0o600)
	}
	b, err := o.Vault.Seal(plain)
	if err != nil {
		return vaultError{err}
	}
	return durable.WriteFile(path, b, 0o600)
}
