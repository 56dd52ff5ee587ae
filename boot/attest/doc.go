// Package attest proves what an agent is: which image the loader has started, that it is the image's agent at the other end
// of a TLS connection, and that all of that is true now.
//
// On the machine, [TPM] measures ([TPM.Extend]), quotes, keeps the lowest security epoch that may run, and seals secrets to
// images. What was measured is a [Log] in TCG's format. Elsewhere, [Verify] judges [Evidence] against a [Policy], and names
// everything that differs.
//
// DESIGN.md has the threat model: what the proof rests on and what it does not show.
package attest
