# shellcheck shell=bash
# Shared functions of the cluster tooling: logging, cache folder, locks, bounded network probes.
# Sourced by every script in hack/. Works with bash 3.2 (macOS) and newer.

set -euo pipefail

# shellcheck disable=SC2034  # read by the scripts that source this file
HACK_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034
ROOT_DIR=$(dirname "$HACK_DIR")
# shellcheck source=hack/versions.sh
. "$HACK_DIR/versions.sh"

CACHE=${COWHAND_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cowhand}
# shellcheck disable=SC2034
CLUSTER=${COWHAND_CLUSTER:-cowhand}
PROBE_SECONDS=10

mkdir -p "$CACHE/bin" "$CACHE/locks" "$CACHE/logs"

# Messages go to standard error, so that standard output carries only what a caller reads.
log() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() {
  printf 'error: %s\n' "$1" >&2
  shift
  while [ $# -gt 0 ]; do
    printf '       %s\n' "$1" >&2
    shift
  done
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# step MESSAGE COMMAND...: runs a command with its output in a log file; prints start, a line every
# 30 s while it runs, its time, and the end of the log if it fails.
step() {
  local message=$1 slug file start pid rc=0 waited=0
  shift
  slug=$(printf '%s' "$message" | tr -cs 'A-Za-z0-9.' '-' | cut -c1-60)
  file="$CACHE/logs/${slug%-}.log"
  start=$SECONDS
  log "$message ..."
  "$@" >"$file" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    waited=$((waited + 1))
    if [ $((waited % 30)) -eq 0 ]; then log "$message ... $((SECONDS - start)) s"; fi
  done
  wait "$pid" || rc=$?
  if [ "$rc" -ne 0 ]; then
    tail -n 25 "$file" | sed 's/^/    | /' >&2
    die "$message failed (exit $rc)" "the whole log: $file"
  fi
  log "$message: done in $((SECONDS - start)) s"
}

# with_timeout SECONDS COMMAND...: like coreutils timeout, which macOS does not have.
with_timeout() {
  local seconds=$1
  shift
  if have timeout; then
    timeout "$seconds" "$@"
    return
  fi
  perl -e 'alarm shift; exec @ARGV or exit 127' "$seconds" "$@"
}

# lock NAME: held until the script ends. A lock whose owner is dead is taken over.
LOCKS_HELD=""
lock() {
  local dir="$CACHE/locks/$1" owner told=""
  case " ${COWHAND_LOCKS:-} " in *" $1 "*) return 0 ;; esac # a parent script holds it
  until mkdir "$dir" 2>/dev/null; do
    owner=$(cat "$dir/pid" 2>/dev/null || true)
    if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then
      # Only one of several waiters wins the rename, so that no fresh lock is removed.
      if mv "$dir" "$dir.stale.$$" 2>/dev/null; then rm -rf "$dir.stale.$$"; fi
      continue
    fi
    if [ -z "$told" ]; then log "waiting for another run (process ${owner:-unknown}, $dir)"; fi
    told=1
    sleep 1
  done
  echo $$ >"$dir/pid"
  LOCKS_HELD="$LOCKS_HELD $dir"
  COWHAND_LOCKS="${COWHAND_LOCKS:-} $1"
  export COWHAND_LOCKS
  trap release_locks EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}
release_locks() {
  local dir
  for dir in $LOCKS_HELD; do rm -rf "$dir"; done
  LOCKS_HELD=""
}

# version_at_least HAVE WANT: compares dotted numbers.
version_at_least() {
  awk -v have="$1" -v want="$2" 'BEGIN {
    split(have, h, /[.+-]/); n = split(want, w, /[.+-]/)
    for (i = 1; i <= n; i++) { if (h[i] + 0 > w[i] + 0) exit 0; if (h[i] + 0 < w[i] + 0) exit 1 }
    exit 0 }'
}

host_os() { uname -s | tr '[:upper:]' '[:lower:]'; }
host_arch() {
  case $(uname -m) in
    x86_64 | amd64) echo amd64 ;;
    aarch64 | arm64) echo arm64 ;;
    *) die "unsupported processor $(uname -m)" "amd64 and arm64 are supported" ;;
  esac
}

# sha256 of files, or of standard input.
sha256() { if have sha256sum; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

# reachable URL: whether a web address answers within the probe's time.
reachable() {
  have curl && curl -fsSLI --connect-timeout "$PROBE_SECONDS" -m "$PROBE_SECONDS" -o /dev/null "$1" 2>/dev/null
}

is_root() { [ "$(id -u)" -eq 0 ]; }

# apt_install PACKAGE...: installs what is missing; needs root on Debian or Ubuntu.
apt_install() {
  local package missing=""
  for package in "$@"; do
    if ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
      missing="$missing $package"
    fi
  done
  if [ -z "$missing" ]; then return 0; fi
  have apt-get || die "apt-get was not found" "this step works on Debian and Ubuntu; install by hand:$missing"
  is_root || die "root is needed to install:$missing" "run: sudo apt-get install$missing"
  lock apt
  step "apt-get update" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 update
  # shellcheck disable=SC2086  # a list of package names
  step "apt-get install$missing" env DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing
}

# missing_sys_resource: true where CAP_SYS_RESOURCE (bit 24) is not in the bounding set, as in some
# build machines. Containers then cannot start until it is taken out of their specification.
missing_sys_resource() {
  local bounding
  [ -r /proc/self/status ] || return 1
  bounding=$(awk '/^CapBnd:/ {print $2}' /proc/self/status)
  [ $(((0x$bounding >> 24) & 1)) -eq 0 ]
}

docker_up() { have docker && with_timeout "$PROBE_SECONDS" docker version >/dev/null 2>&1; }
image_exists() { docker image inspect "$1" >/dev/null 2>&1; }

# can_pull IMAGE: whether the registry of an image answers within the probe's time. COWHAND_OFFLINE=1
# says no without asking. The engine asks, so that its proxy and mirror settings count.
can_pull() {
  if [ "${COWHAND_OFFLINE:-}" = 1 ]; then return 1; fi
  with_timeout "$PROBE_SECONDS" docker manifest inspect "$1" >/dev/null 2>&1
}

# keep_image IMAGE TAR: saves an image in the cache, whole or not at all.
keep_image() {
  docker save -o "$2.part" "$1"
  mv "$2.part" "$2"
}

# docker_build ARGUMENTS...: `docker build` with this machine's proxy settings passed on, and without
# the attestations that make `ctr images import` fail on images from the newer builder.
docker_build() {
  local name
  for name in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy; do
    if [ -n "${!name:-}" ]; then set -- --build-arg "$name" "$@"; fi
  done
  BUILDX_NO_DEFAULT_ATTESTATIONS=1 docker build "$@"
}
