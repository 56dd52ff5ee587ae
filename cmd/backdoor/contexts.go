package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/backdoor-rhs/backdoor/cmd/internal/strictjson"
	"github.com/backdoor-rhs/backdoor/internal/durable"
)

// contextsVersion is the version of the configuration file.
const contextsVersion = 1

// contexts is the configuration file: the agents that this operator knows.
type contexts struct {
	Version  int       `json:"version"`
	Current  string    `json:"current,omitempty"`
	Contexts []agentAt `json:"contexts"`
}

// agentAt is one context: where an agent is, how its certificate is known, and how to be let in.
type agentAt struct {
	Name         string `json:"name"`
	URL          string `json:"url"`
	User         string `json:"user,omitempty"`
	Password     string `json:"password,omitempty"` // only if the operator asked for it
	PasswordFile string `json:"passwordFile,omitempty"`
	Token        string `json:"token,omitempty"`    // of the session that login opened
	Session      string `json:"session,omitempty"`  // its URI
	CAFile       string `json:"caFile,omitempty"`   // PEM
	Fingerprint  string `json:"sha256,omitempty"`   // of the pinned certificate
	Insecure     bool   `json:"insecure,omitempty"` // the certificate is not checked at all
	Attested     string `json:"attested,omitempty"` // file that says what the agent has to prove
}

// defaultContextsPath is where the file lies unless -config says otherwise.
func defaultContextsPath() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("find the configuration directory: %w; set XDG_CONFIG_HOME or use -config", err)
	}
	return filepath.Join(dir, "backdoor", "config.json"), nil
}

// readContexts reads the file; one that is not there is an empty one.
func readContexts(path string) (contexts, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return contexts{Version: contextsVersion}, nil
	}
	if err != nil {
		return contexts{}, fmt.Errorf("read contexts: %w", err)
	}
	return parseContexts(path, data)
}

func parseContexts(name string, data []byte) (contexts, error) {
	var c contexts
	if err := strictjson.Unmarshal(name, data, &c); err != nil {
		return contexts{}, err
	}
	if c.Version != contextsVersion {
		return contexts{}, fmt.Errorf("%s: version: want %d, found %d", name, contextsVersion, c.Version)
	}
	seen := make(map[string]bool)
	for i, a := range c.Contexts {
		if a.Name == "" || a.URL == "" {
			return contexts{}, fmt.Errorf("%s: contexts[%d]: name and url are required", name, i)
		}
		if seen[a.Name] {
			return contexts{}, fmt.Errorf("%s: contexts[%d]: there are two contexts named %q", name, i, a.Name)
		}
		seen[a.Name] = true
	}
	if c.Current != "" && !seen[c.Current] {
		return contexts{}, fmt.Errorf("%s: current: there is no context %q", name, c.Current)
	}
	return c, nil
}

// write replaces the file in one step, readable by its owner only.
func (c contexts) write(path string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write contexts: %w", err)
		}
	}()
	c.Version = contextsVersion
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return durable.WriteFile(path, append(data, '\n'), 0o600)
}

// find returns a context by its name.
func (c contexts) find(name string) (agentAt, error) {
	i := slices.IndexFunc(c.Contexts, func(a agentAt) bool { return a.Name == name })
	if i < 0 {
		if len(c.Contexts) == 0 {
			return agentAt{}, fmt.Errorf("there is no context %q, nor any other; make one with: backdoor login -host URL -context %s", name, name)
		}
		return agentAt{}, fmt.Errorf("there is no context %q; see: backdoor config get-contexts", name)
	}
	return c.Contexts[i], nil
}

// put adds a context or replaces the one of that name.
func (c *contexts) put(a agentAt) {
	i := slices.IndexFunc(c.Contexts, func(b agentAt) bool { return b.Name == a.Name })
	if i < 0 {
		c.Contexts = append(c.Contexts, a)
		return
	}
	c.Contexts[i] = a
}

// shown is the context without its secrets.
func (a agentAt) shown() agentAt {
	for _, s := range []*string{&a.Password, &a.Token} {
		if *s != "" {
			*s = "(hidden)"
		}
	}
	return a
}
