#!/usr/bin/env bash
# Provides kind, kubectl and helm.
#
#   hack/tools.sh ensure      makes all three available, prints nothing on standard output
#   hack/tools.sh path NAME   prints the path of one of them (making it available if needed)
#
# A tool is taken from PATH if its version fits; else it is downloaded in a pinned version and
# checked against the publisher's checksum file; else it is built from its Go module.
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

minimum_of() {
  case $1 in
    kind) echo "$KIND_MINIMUM" ;;
    kubectl) echo "$KUBECTL_MINIMUM" ;;
    helm) echo "$HELM_MINIMUM" ;;
    *) die "unknown tool $1" "known are kind, kubectl, helm" ;;
  esac
}

# version_of NAME PATH: prints the dotted version of a program; nothing if it does not run.
version_of() {
  local text
  case $1 in
    kind) text=$(with_timeout "$PROBE_SECONDS" "$2" version 2>/dev/null) ;;
    kubectl) text=$(with_timeout "$PROBE_SECONDS" "$2" version --client 2>/dev/null) ;;
    helm) text=$(with_timeout "$PROBE_SECONDS" "$2" version --short 2>/dev/null) ;;
  esac || return 0
  printf '%s\n' "$text" | sed -n 's/^[^0-9]*v\([0-9][0-9]*\.[0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' | head -n 1
}

pinned_name() {
  case $1 in
    kind) echo "kind-$KIND_VERSION" ;;
    kubectl) echo "kubectl-$KUBERNETES_VERSION" ;;
    helm) echo "helm-$HELM_VERSION" ;;
  esac
}

url_of() {
  local platform
  platform="$(host_os)-$(host_arch)"
  case $1 in
    kind) echo "https://kind.sigs.k8s.io/dl/v$KIND_VERSION/kind-$platform" ;;
    kubectl) echo "https://dl.k8s.io/release/v$KUBECTL_DOWNLOAD_VERSION/bin/$(host_os)/$(host_arch)/kubectl" ;;
    helm) echo "https://get.helm.sh/helm-v$HELM_VERSION-$platform.tar.gz" ;;
  esac
}

checksum_url_of() { if [ "$1" = kubectl ]; then echo "$(url_of "$1").sha256"; else echo "$(url_of "$1").sha256sum"; fi; }

fetch() { curl -fsSL --retry 3 --connect-timeout "$PROBE_SECONDS" -m 600 -o "$2" "$1"; }

# download NAME FILE: fetches the program and the publisher's checksum file, refuses a mismatch.
download() {
  local name=$1 file=$2 url work wanted got
  url=$(url_of "$name")
  work=$(mktemp -d "$CACHE/work.XXXXXX")
  fetch "$url" "$work/program"
  fetch "$(checksum_url_of "$name")" "$work/checksum"
  wanted=$(awk '{print $1; exit}' "$work/checksum")
  got=$(sha256 "$work/program" | awk '{print $1}')
  if [ -z "$wanted" ] || [ "$wanted" != "$got" ]; then
    echo "checksum of $url is $got, the publisher says ${wanted:-nothing}" >&2
    rm -rf "$work"
    return 1
  fi
  if [ "$name" = helm ]; then
    tar -xzf "$work/program" -C "$work" "$(host_os)-$(host_arch)/helm"
    mv "$work/$(host_os)-$(host_arch)/helm" "$work/program"
  fi
  chmod 0755 "$work/program"
  mv "$work/program" "$file"
  rm -rf "$work"
}

build() {
  local component=$1 built
  if [ "$1" = kubectl ]; then
    component=kubernetes
    [ "$(host_os)" = linux ] || die "kubectl $KUBECTL_MINIMUM or newer is needed" "install it and try again"
  fi
  built=$("$HACK_DIR/go-build.sh" "$component")
  install -m 0755 "$built/$1" "$2.part.$$"
  mv "$2.part.$$" "$2"
}

# path_of NAME: makes the tool available and prints its path.
path_of() {
  local name=$1 found version pinned
  found=$(command -v "$name" 2>/dev/null || true)
  if [ -n "$found" ]; then
    version=$(version_of "$name" "$found")
    if [ -n "$version" ] && version_at_least "$version" "$(minimum_of "$name")"; then
      echo "$found"
      return 0
    fi
  fi
  pinned="$CACHE/bin/$(pinned_name "$name")"
  if [ ! -x "$pinned" ]; then
    lock "tool-$name"
    if [ ! -x "$pinned" ]; then
      if [ -n "$found" ]; then log "$found is version ${version:-unknown}, at least $(minimum_of "$name") is needed"; fi
      if [ "${COWHAND_OFFLINE:-}" != 1 ] && reachable "$(url_of "$name")"; then
        step "fetching $name" download "$name" "$pinned"
      else
        log "$name cannot be downloaded here: building it from its Go module"
        build "$name" "$pinned"
      fi
    fi
  fi
  ln -sf "$(basename "$pinned")" "$CACHE/bin/$name"
  echo "$CACHE/bin/$name"
}

case ${1:-} in
  ensure) for name in kind kubectl helm; do path_of "$name" >/dev/null; done ;;
  path)
    [ $# -eq 2 ] || die "usage: $0 path kind|kubectl|helm"
    path_of "$2"
    ;;
  *) die "usage: $0 ensure | path kind|kubectl|helm" ;;
esac
