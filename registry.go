// Package registry makes Caddy a container registry mirror: a pull-through
// cache of Docker Hub and any other registry, that fetches every byte once.
//
//	mirror.example.com {
//		registry_mirror
//	}
//
// Build Caddy with it by
//
//	xcaddy build --with github.com/caddy-registry/mirror
//
// Importing this package registers all its Caddy modules:
//
//   - registry, the app: the store and the registries (package module)
//   - http.handlers.registry_mirror: the mirror (package module)
//   - admin.api.registry: looking at the store and keeping it, over the admin
//     API (package module), and the command `caddy registry`
//   - registry.storage.disk: content in a directory (package storage/disk)
//   - registry.storage.s3: content in a bucket, behind a cache on disk (package
//     storage/s3)
//   - registry.catalog.sqlite: what is in the store, in a file (package
//     storage/catalog/sqlite)
//   - the Caddyfile directive and the global option (package caddyfile)
package registry

import (
	_ "github.com/caddy-registry/mirror/caddyfile"
	_ "github.com/caddy-registry/mirror/module"
	_ "github.com/caddy-registry/mirror/storage/catalog/sqlite"
	_ "github.com/caddy-registry/mirror/storage/disk"
	_ "github.com/caddy-registry/mirror/storage/s3"
)
