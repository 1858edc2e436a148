#!/usr/bin/env bash
# Builds one component from its Go module, for machines that reach a Go module proxy but no
# download site or image registry. Called by tools.sh and node-image.sh.
#
#   hack/go-build.sh COMPONENT   builds if it is missing, prints the folder with its programs
#
# Versions and content hashes are pinned in hack/gomods/COMPONENT/go.mod and go.sum.
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

GO_MINIMUM=1.26.0

usage() { die "usage: $0 kubernetes|etcd|coredns|containerd|runc|runc-wrapper|kind|helm|local-path-provisioner|netpol-agent"; }

ldflags_for() {
  local v=v$KUBERNETES_VERSION package flags="-s -w"
  case $1 in
    kubernetes)
      for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        flags="$flags -X $package.gitVersion=$v -X $package.gitTreeState=clean"
        flags="$flags -X $package.gitMajor=${KUBERNETES_VERSION%%.*}"
        flags="$flags -X $package.gitMinor=$(echo "$KUBERNETES_VERSION" | cut -d. -f2)"
      done
      ;;
    coredns) flags="$flags -X github.com/coredns/coredns/coremain.GitCommit=v$COREDNS_VERSION" ;;
    helm) flags="$flags -X helm.sh/helm/v3/internal/version.version=v$HELM_VERSION" ;;
    containerd) flags="$flags -X github.com/containerd/containerd/v2/version.Version=v$CONTAINERD_VERSION" ;;
    runc) flags="$flags -extldflags -static -X main.version=$RUNC_VERSION" ;;
  esac
  echo "$flags"
}

tags_for() {
  case $1 in
    containerd) echo "no_btrfs,no_zfs,no_devmapper" ;;
    runc) echo "seccomp,netgo,osusergo" ;;
    *) echo "" ;;
  esac
}

need_go() {
  local have_version
  have go || die "Go $GO_MINIMUM or newer is needed to build $1" "install Go, or give this machine access to the release downloads"
  have_version=$(go env GOVERSION | sed 's/^go//')
  version_at_least "$have_version" "$GO_MINIMUM" ||
    die "Go $GO_MINIMUM or newer is needed to build $1, found $have_version"
}

# Everything that changes the result is part of the name of the folder.
cache_dir_for() {
  local hash
  hash=$( (cat "$HACK_DIR/gomods/$1"/go.* && find "$HACK_DIR/gomods/$1" -name '*.go' -exec cat {} + &&
    ldflags_for "$1" && tags_for "$1") | sha256 - | cut -c1-12)
  echo "$CACHE/go/$1-$2-$(host_arch)-$hash"
}

compile() {
  local component=$1 goos=$2 out=$3 cgo=0
  if [ "$component" = runc ]; then cgo=1; fi # libseccomp is a C library, linked statically
  cd "$HACK_DIR/gomods/$component"
  # The module's own program, else the packages that the go.mod's tool directives name.
  # shellcheck disable=SC2046  # a list of packages
  GOOS=$goos CGO_ENABLED=$cgo GOFLAGS='' nice -n 5 go build -mod=readonly -trimpath -buildvcs=false \
    -tags "$(tags_for "$component")" -ldflags "$(ldflags_for "$component")" -o "$out/" \
    $(if [ -f main.go ]; then echo .; else go list tool; fi)
}

component=${1:-}
if [ -z "$component" ] || [ ! -d "$HACK_DIR/gomods/$component" ]; then usage; fi
goos=linux
case $component in kind | helm) goos=$(host_os) ;; esac
if [ "$component" = kubernetes ] && [ "${2:-}" = host ]; then goos=$(host_os); fi
out=$(cache_dir_for "$component" "$goos")
if [ ! -e "$out/.complete" ]; then
  need_go "$component"
  if [ "$component" = runc ]; then apt_install gcc libc6-dev libseccomp-dev pkg-config; fi
  lock "go-$component"
  if [ ! -e "$out/.complete" ]; then
    mkdir -p "$out"
    step "building $component from its Go module" compile "$component" "$goos" "$out"
    touch "$out/.complete"
  fi
fi
echo "$out"
