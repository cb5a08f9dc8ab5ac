#!/bin/bash
# Installs what the end-to-end tests run: clients and servers from Debian 12,
# the others by Go into .cache. Needs root and Go. What is there
# already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

crane=github.com/google/go-containerregistry/cmd/crane@v0.22.1
regctl=github.com/regclient/regclient/cmd/regctl@v0.11.7
helm=helm.sh/helm/v3/cmd/helm@v3.22.0
cosign=github.com/sigstore/cosign/v2/cmd/cosign@v2.6.5
dockerd29=github.com/moby/moby/v2/cmd/dockerd@v2.0.0-beta.24
containerd=github.com/containerd/containerd/v2
containerd_version=v2.4.2
versitygw=github.com/versity/versitygw/cmd/versitygw@v1.8.0
minio=github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c

packages=(
  skopeo podman buildah # the containers/image family
  docker-registry       # registry:2
  containerd runc docker.io
  mount e2fsprogs       # small filesystems
  gcc libc6-dev         # for go test -race
  strace                # counts system calls
  curl
  qemu-utils qemu-block-extra # disk images, and how qemu reads them over HTTP
  qemu-system-x86 busybox-static # a machine whose kernel has an NFS client
)

[ "$(id -u)" = 0 ] || { echo "e2e/install.sh: installing packages needs root" >&2; exit 1; }

installed() { # PACKAGE
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing=()
for package in "${packages[@]}"; do
  installed "$package" || missing+=("$package")
done

if [ ${#missing[@]} -gt 0 ]; then
  # Debian starts what it installs, unless this file says no. The tests start
  # their own.
  policy=/usr/sbin/policy-rc.d
  saved=
  if [ -e $policy ]; then
    saved=$(mktemp)
    cp -p $policy "$saved"
  fi
  restore() {
    if [ -n "$saved" ]; then mv "$saved" $policy; else rm -f $policy; fi
  }
  trap restore EXIT
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy

  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null
fi

go_install() { # FOLDER PACKAGE@VERSION
  local binary=$PWD/.cache/$1/${2##*/} package=${2%@*} version=${2#*@}
  binary=${binary%@*}
  if [ -x "$binary" ] && go version -m "$binary" | awk -v package="$package" -v version="$version" '
      $1 == "path" { right = $2 == package }
      $1 == "mod" { right = right && $3 == version }
      END { exit !right }'; then
    return
  fi
  echo "go install $2"
  CGO_ENABLED=0 GOFLAGS= GOBIN=$PWD/.cache/$1 go install -ldflags='-s -w' "$2"
}

go_install bin $crane
go_install bin $regctl
go_install bin $helm
go_install bin $cosign
# What S3 is: two servers that differ where clients go wrong.
go_install bin $versitygw
go_install bin $minio
# Not in .cache/bin: Debian's of the same names are meant there.
go_install docker29 $dockerd29
for command in containerd ctr containerd-shim-runc-v2; do
  go_install containerd2 $containerd/cmd/$command@$containerd_version
done

# That kernel: this machine's own may have no NFS.
if [ ! -e .cache/kernel/modules.dep ]; then
  rm -rf .cache/kernel .cache/kernel.new
  mkdir -p .cache/kernel.new
  kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
  [ -n "$kernel" ] || { echo "e2e/install.sh: apt knows no linux-image-cloud-amd64: run apt-get update" >&2; exit 1; }
  # The list of packages may be older than what there is to download.
  (cd .cache/kernel.new && { apt-get download -qq "$kernel" || { apt-get update -qq && apt-get download -qq "$kernel"; }; })
  dpkg -x .cache/kernel.new/*.deb .cache/kernel.new/root
  mv .cache/kernel.new/root/boot/vmlinuz-* .cache/kernel.new/vmlinuz
  busybox depmod -b .cache/kernel.new/root "$(ls .cache/kernel.new/root/lib/modules)"
  mkdir -p .cache/kernel
  mv .cache/kernel.new/vmlinuz .cache/kernel.new/root/lib/modules/* .cache/kernel/
  mv .cache/kernel/[0-9]*/modules.dep .cache/kernel/
  rm -rf .cache/kernel.new
fi

# Neither oras nor any program that uses today's containers/image can be had by `go install`,
# and the server of NFS is a library.
CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -C e2e/testdata/attach -trimpath -ldflags='-s -w' -o "$PWD/.cache/bin/attach"
CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -C e2e/testdata/nfs -trimpath -ldflags='-s -w' -o "$PWD/.cache/bin/nfs"
CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -C e2e/testdata/cimg -trimpath -ldflags='-s -w' -o "$PWD/.cache/bin/cimg" \
  -tags containers_image_openpgp,exclude_graphdriver_btrfs,containers_image_docker_daemon_stub,containers_image_storage_stub
