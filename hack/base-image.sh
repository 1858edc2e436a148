#!/usr/bin/env bash
# Makes the base image that all Dockerfiles name in FROM available locally.
#
#   hack/base-image.sh ensure   prints the image's name
#
# It is pulled where that is possible; else Debian's own debootstrap makes it (Linux, root) from the
# package archive that this machine uses. The result is kept in the cache.
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TAR="$CACHE/images/base-$DEBIAN_SUITE-$(host_arch).tar"

# The Debian archive in use here: from the system's own sources if it is a Debian.
mirror() {
  awk '/^URIs:/ {print $2; exit} /^deb / {for (i = 2; i <= NF; i++) if ($i ~ /^http/) {print $i; exit}}' \
    /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1
}

make_root() {
  local root=$1 mirror
  mirror=$(mirror)
  rm -rf "$root"
  mkdir -p "$root"
  # shellcheck disable=SC2086  # without a known mirror debootstrap takes its default
  debootstrap --variant=minbase "$DEBIAN_SUITE" "$root" $mirror
  # The suites for updates, written as the system's own sources have them.
  if grep -qs "Suites: $DEBIAN_SUITE" /etc/apt/sources.list.d/debian.sources; then
    rm -f "$root/etc/apt/sources.list"
    cp /etc/apt/sources.list.d/debian.sources "$root/etc/apt/sources.list.d/"
  fi
  echo 'APT::Install-Recommends "false";' >"$root/etc/apt/apt.conf.d/no-recommends"
  chroot "$root" apt-get update
  DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get -y upgrade
  chroot "$root" apt-get clean
  rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/log/*.log \
    "$root"/var/log/apt "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/info/*
  find "$root/usr/share/locale" -mindepth 1 -maxdepth 1 ! -name locale.alias -exec rm -rf {} +
  # As in the official slim images: documentation of packages is not installed later either.
  printf '%s\n' 'path-exclude /usr/share/doc/*' 'path-include /usr/share/doc/*/copyright' \
    'path-exclude /usr/share/man/*' 'path-exclude /usr/share/info/*' 'path-exclude /usr/share/locale/*' \
    'path-include /usr/share/locale/locale.alias' >"$root/etc/dpkg/dpkg.cfg.d/docker"
  printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d" # no services in containers
  chmod 0755 "$root/usr/sbin/policy-rc.d"
  rm -f "$root/etc/hostname" "$root/etc/resolv.conf"
}

import_root() {
  tar -C "$1" --numeric-owner -c . | docker import --change 'CMD ["bash"]' - "$BASE_IMAGE"
}

ensure() {
  if image_exists "$BASE_IMAGE"; then return 0; fi
  lock base-image
  if image_exists "$BASE_IMAGE"; then return 0; fi
  if [ -e "$TAR" ]; then
    step "loading $BASE_IMAGE from the cache" docker load -i "$TAR"
    return 0
  fi
  if can_pull "$BASE_IMAGE"; then
    step "pulling $BASE_IMAGE" docker pull "$BASE_IMAGE"
    return 0
  fi
  log "$BASE_IMAGE cannot be pulled: making it with debootstrap"
  if [ "$(host_os)" != linux ] || ! is_root; then
    die "$BASE_IMAGE cannot be pulled, and making it needs root on Linux" \
      "give the Docker engine access to an image registry, or load the image by hand (docker load)"
  fi
  have debootstrap || apt_install debootstrap
  mkdir -p "$CACHE/images" "$CACHE/work"
  step "debootstrap of $DEBIAN_SUITE" make_root "$CACHE/work/base-root"
  step "importing $BASE_IMAGE" import_root "$CACHE/work/base-root"
  rm -rf "$CACHE/work/base-root"
  step "keeping $BASE_IMAGE in the cache" keep_image "$BASE_IMAGE" "$TAR"
}

case ${1:-} in
  ensure)
    "$HACK_DIR/engine.sh" ensure
    ensure
    echo "$BASE_IMAGE"
    ;;
  *) die "usage: $0 ensure" ;;
esac
