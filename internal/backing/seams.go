package backing

import "context"

// blockers are what of the clusters stands against the deletion of versions.
func (l *Library) blockers(ctx context.Context, versions []Version) ([]Blocker, error) {
	return nil, nil
}

// registrations are those of a version. l.mu is not held.
func (l *Library) registrations(name, version string) []Registration { return []Registration{} }

// begin starts what registrations need, once there are settings and records; it ends
// with ctx, and l.wait waits for it.
func (l *Library) begin(ctx context.Context) {}

// forget lets go of what is known of a version's registrations: it is no more.
func (l *Library) forget(ctx context.Context, name, version string) error { return nil }
