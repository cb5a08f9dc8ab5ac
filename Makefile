# The flags are xcaddy's: what comes out is what `xcaddy build` would make.
GOBUILD = CGO_ENABLED=0 go build -trimpath -tags nobadger,nomysql,nopgx -ldflags '-w -s'

# What gofmt looks at: not ./data, which may be somebody else's.
SOURCE = *.go bench caddyfile e2e examples internal module storage xcaddy

# For `go test`; CI adds -v.
TESTFLAGS ?=

# Where others find this machine.
HOST ?= $(firstword $(shell hostname -I 2>/dev/null) $(shell uname -n))

define HOWTO
A mirror of Docker Hub and other registries, for everyone who can reach
http://$(HOST):5000. There is no TLS: keep it inside your network.

docker: in /etc/docker/daemon.json, then `systemctl reload docker`:

  {
    "registry-mirrors": ["http://$(HOST):5000"],
    "insecure-registries": ["$(HOST):5000"]
  }

containerd: in /etc/containerd/certs.d/docker.io/hosts.toml (config_path of
its registry settings says where certs.d is), and likewise for other registries:

  server = "https://registry-1.docker.io"
  [host."http://$(HOST):5000"]
    capabilities = ["pull", "resolve"]

podman: in /etc/containers/registries.conf.d/mirror.conf:

  [[registry]]
  location = "docker.io"
  [[registry.mirror]]
  location = "$(HOST):5000/docker.io"
  insecure = true

endef
export HOWTO

.PHONY: help build run test e2e bench fmt clean

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build ./caddy: Caddy with the mirror in it
	$(GOBUILD) -o caddy ./xcaddy

run: build ## start a mirror on port 5000 that keeps its content in ./data
	@mkdir -p data
	@echo "$$HOWTO"
	@exec ./caddy run --config examples/lan/Caddyfile

test: ## check the format, vet, and run the tests that need Go only
	@unformatted=$$(gofmt -l $(SOURCE)) && test -z "$$unformatted" || { echo "run make fmt; unformatted: $$unformatted" >&2; exit 1; }
	go vet ./...
	go vet -tags e2e ./e2e
	go vet -tags bench ./bench
	go test $(TESTFLAGS) ./...

# The race detector needs the C compiler that install.sh installs. Tests wait for
# disks and timers more than they compute, so the longest begin first, beside others.
e2e: ## as root on Debian 12: install real clients and servers, and test with them
	e2e/install.sh
	status=0; \
	CGO_ENABLED=1 go test -race -p 3 -timeout 20m $(TESTFLAGS) ./module ./storage/s3 ./internal/retain ./... || status=1; \
	go test -tags e2e -count=1 -timeout 20m $(TESTFLAGS) ./e2e || status=1; \
	exit $$status

bench: ## measure pushes, backing images, and a store of a million manifests; takes some minutes and 12 GB
	go test -tags bench -count=1 -timeout 60m -v ./bench

fmt: ## format the source
	gofmt -w $(SOURCE)

clean: ## remove what was built and installed here; ./data stays
	rm -rf caddy .cache
