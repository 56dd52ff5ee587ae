package journal

// Journal is an open journal.
type Journal struct{}
