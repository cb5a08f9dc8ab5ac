// Package sqlite is the guest module registry.catalog.sqlite: a catalog in a
// local file.
package sqlite

import _ "modernc.org/sqlite" // the driver "sqlite"
