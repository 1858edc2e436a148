#!/usr/bin/env bash
# The programs that the tests of `make unit` call, besides the store (store.sh) and helm (tools.sh).
#
#   hack/test-packages.sh ensure    as root on Debian or Ubuntu: install exactly what is missing; elsewhere:
#                                   say what to install, and which tests are skipped until then
#   hack/test-packages.sh missing   print the packages that are missing, install nothing
#   hack/test-packages.sh go        run the Go tests, or say why they are not run
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Command, package, and what is skipped without it ("-": the tests fail and name the command).
WANTED="git git -
nft nftables tests/adversarial/test_around_the_proxy.py
ip iproute2 tests/adversarial/test_around_the_proxy.py
sysctl procps tests/adversarial/test_around_the_proxy.py
lua5.1 lua5.1 tests/unit/api/test_argocd.py
rg ripgrep tests/unit/sandboxd/test_grep.py"

# found COMMAND: on PATH or where root's programs are; any Lua counts.
found() {
  PATH=$PATH:/usr/sbin:/sbin
  if have "$1"; then return 0; fi
  [ "$1" = lua5.1 ] && { have lua5.4 || have lua; }
}

# Linux alone has packet filters and namespaces to test.
applies() { [ "$(host_os)" = linux ] || case $1 in nft | ip | sysctl) return 1 ;; esac; }

missing() {
  local command package
  while read -r command package _; do
    if applies "$command" && ! found "$command"; then echo "$package"; fi
  done <<<"$WANTED"
}

ensure() {
  local packages command package skipped
  packages=$(missing)
  if [ -z "$packages" ]; then return 0; fi
  if is_root && have apt-get; then
    # shellcheck disable=SC2086  # a list of package names
    apt_install $packages
    return 0
  fi
  log "missing for the tests (install them, or run this as root on Debian):"
  while read -r command package skipped; do
    if ! applies "$command" || found "$command"; then continue; fi
    if [ "$skipped" = - ]; then die "$command is needed (package $package)" "install it and try again"; fi
    log "  $package: without it $skipped is skipped (in part)"
  done <<<"$WANTED"
}

go_tests() {
  local module wanted got
  for module in "$HACK_DIR"/gomods/*/; do
    if ! compgen -G "$module*_test.go" >/dev/null; then continue; fi
    wanted=$(awk '/^go / {print $2; exit}' "$module/go.mod")
    if ! have go; then
      log "skipped: go test of $(basename "$module"): Go $wanted or newer is not installed"
      continue
    fi
    got=$(GOTOOLCHAIN=local go env GOVERSION | sed 's/^go//')
    if ! version_at_least "$got" "$wanted"; then
      log "skipped: go test of $(basename "$module"): Go $wanted or newer is needed, found $got"
      continue
    fi
    log "go test of $(basename "$module")"
    (cd "$module" && GOTOOLCHAIN=local GOFLAGS='' go test -mod=readonly ./...)
  done
}

case ${1:-} in
  ensure) ensure ;;
  missing) missing ;;
  go) go_tests ;;
  *) die "usage: $0 ensure|missing|go" ;;
esac
