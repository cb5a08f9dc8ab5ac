// Command caddy is Caddy with this module built in: what
//
//	xcaddy build --with github.com/caddy-registry/mirror
//
// would make, from plain go build.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-registry/mirror"
)

func main() {
	caddycmd.Main()
}
