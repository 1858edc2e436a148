#!/usr/bin/env bash
# Builds the project's images and loads them into the kind cluster.
#
#   hack/images.sh build [NAME...]   builds what is not there yet; writes images.env and
#                                    image-values.yaml (Helm values) into the cache
#   hack/images.sh load [NAME...]    loads into the cluster's node what is missing there
#   hack/images.sh refs              prints NAME=IMAGE lines of the last build
#
# Tags are hashes of all that goes into an image, so that an unchanged tree builds and loads nothing.
# Python wheels are resolved here and not in the image build: they are pinned with hashes, and an
# image build cannot reach or verify a package index on every machine.
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

NAMES="cowhand sandbox model-server valkey"
KEEP_TAGS=3

folder_of() {
  case $1 in
    cowhand) echo operator ;;
    sandbox) echo sandbox-image ;;
    model-server) echo model-server ;;
    valkey) echo images/valkey ;;
    *) die "unknown image $1" "known are: $NAMES" ;;
  esac
}

# The key of the image in the chart's values; nothing for an image that the chart does not install.
values_key_of() {
  case $1 in
    cowhand) echo image ;;
    sandbox) echo sandboxImage ;;
    valkey) echo store.image ;;
  esac
}

present() { [ -f "$ROOT_DIR/$(folder_of "$1")/Dockerfile" ]; }

# sources NAME: the files of an image's context, relative to its folder.
sources() {
  (cd "$ROOT_DIR/$(folder_of "$1")" && find . \
    \( -name __pycache__ -o -name '.*_cache' -o -name '*.egg-info' -o -name tests -o -name dist -o -name build \) -prune -o \
    -type f ! -name '*.pyc' ! -name '*.md' ! -name 'dev.*' ! -name '.DS_Store' -print) | LC_ALL=C sort
}

hash_files() { if have sha256sum; then tr '\n' '\0' | xargs -0 sha256sum; else tr '\n' '\0' | xargs -0 shasum -a 256; fi; }

engine_arch() { docker version -f '{{.Server.Arch}}'; }

# snapshot NAME: copies the sources into the folder that becomes the build context, so that the hash
# and the image are of the same files even while somebody edits them.
snapshot() {
  local name=$1 folder context file
  folder="$ROOT_DIR/$(folder_of "$name")"
  context="$CACHE/work/context-$name"
  rm -rf "$context"
  mkdir -p "$context"
  sources "$name" >"$context.files"
  (cd "$folder" && tar -cf - -T "$context.files") | (cd "$context" && tar -xf -)
  chmod -R u=rwX,go=rX "$context"
  echo "$context"
}

# ref_of NAME CONTEXT: image name with the content hash as tag. requirements.lock pins the wheels.
ref_of() {
  local hash
  hash=$( (
    cd "$2" || exit 1
    hash_files <"$2.files"
    echo "$BASE_ID $ARCH"
  ) | sha256 - | cut -c1-12)
  echo "cowhand/$1:$hash"
}

uv_path() {
  if [ -x "$ROOT_DIR/.venv/bin/uv" ]; then
    echo "$ROOT_DIR/.venv/bin/uv"
  elif [ -n "${UV:-}" ]; then
    echo "$UV"
  elif have uv && uv --version >/dev/null 2>&1; then
    command -v uv
  else
    die "uv was not found" "make the development environment first: make setup"
  fi
}

# wheels LOCK DIR: installs the pinned wheels for the image's Python and platform.
wheels() {
  local platform=x86_64-manylinux_2_28
  if [ "$ARCH" = arm64 ]; then platform=aarch64-manylinux_2_28; fi
  "$(uv_path)" pip install --no-config --no-deps --require-hashes --only-binary :all: --target "$2" \
    --python-version 3.11 --python-platform "$platform" -r "$1"
  rm -rf "${2:?}/bin" "$2/.lock"
  find "$2" \( -name __pycache__ -o -name tests -o -name test \) -type d -prune -exec rm -rf {} +
}

# make_image REF CONTEXT: adds the wheels and builds.
make_image() {
  local ref=$1 context=$2
  if [ -f "$context/requirements.lock" ]; then
    mkdir -p "$context/site-packages"
    if grep -q '^[A-Za-z0-9]' "$context/requirements.lock"; then
      wheels "$context/requirements.lock" "$context/site-packages"
    fi
    chmod -R u=rwX,go=rX "$context/site-packages"
  fi
  docker_build -t "$ref" "$context"
}

# prune NAME: removes all but the newest tags of one of our images; those in use refuse to go.
prune() {
  local ref
  docker image ls --format '{{.Repository}}:{{.Tag}}' "cowhand/$1" | tail -n "+$((KEEP_TAGS + 1))" |
    while read -r ref; do docker rmi "$ref" >/dev/null 2>&1 || true; done
}

# built_ref NAME: the image of the last build; nothing if there was none.
built_ref() { sed -n "s/^$1=//p" "$CACHE/images.env" 2>/dev/null || true; }

# record NAME REF: remembers the image of a build.
record() {
  touch "$CACHE/images.env"
  { grep -v "^$1=" "$CACHE/images.env" || true; } >"$CACHE/images.env.new"
  echo "$1=$2" >>"$CACHE/images.env.new"
  LC_ALL=C sort -o "$CACHE/images.env" "$CACHE/images.env.new"
  rm -f "$CACHE/images.env.new"
}

write_values() {
  local name ref key
  for name in $NAMES; do
    ref=$(built_ref "$name")
    if [ -z "$ref" ]; then continue; fi
    key=$(values_key_of "$name")
    case $key in
      '') ;;
      *.image) printf '%s:\n  image:\n    repository: %s\n    tag: "%s"\n' "${key%.image}" "${ref%:*}" "${ref##*:}" ;;
      *) printf '%s:\n  repository: %s\n  tag: "%s"\n' "$key" "${ref%:*}" "${ref##*:}" ;;
    esac
  done
}

refs() {
  [ -s "$CACHE/images.env" ] || die "no images are built" "build them with: make images"
  cat "$CACHE/images.env"
}

build() {
  local name ref context
  "$HACK_DIR/base-image.sh" ensure >/dev/null
  BASE_ID=$(docker image inspect -f '{{.Id}}' "$BASE_IMAGE")
  ARCH=$(engine_arch)
  lock images
  mkdir -p "$CACHE/work"
  for name in "$@"; do
    if ! present "$name"; then
      log "skipping image $name: $(folder_of "$name") has no Dockerfile"
      continue
    fi
    context=$(snapshot "$name")
    ref=$(ref_of "$name" "$context")
    if ! image_exists "$ref"; then
      step "building image $ref" make_image "$ref" "$context"
      prune "$name"
    fi
    rm -rf "$context" "$context.files"
    record "$name" "$ref"
  done
  write_values >"$CACHE/image-values.yaml.new"
  mv "$CACHE/image-values.yaml.new" "$CACHE/image-values.yaml"
}

import_into_node() {
  local node=$1
  shift
  docker save "$@" | docker exec -i "$node" ctr -n k8s.io images import - 2>&1
}

load() {
  local node="$CLUSTER-control-plane" name ref there missing=""
  "$HACK_DIR/engine.sh" ensure
  docker container inspect "$node" >/dev/null 2>&1 || die "there is no cluster $CLUSTER" "make it with: make cluster"
  lock images
  there=$(docker exec "$node" ctr -n k8s.io images list -q 2>/dev/null)
  for name in "$@"; do
    ref=$(built_ref "$name")
    if [ -z "$ref" ]; then continue; fi
    if printf '%s\n' "$there" | grep -q "/$ref\$"; then continue; fi
    image_exists "$ref" || die "the image $ref is not built" "build it with: make images"
    missing="$missing $ref"
  done
  if [ -z "$missing" ]; then return 0; fi
  # One archive, so that the shared base layers go over once.
  # shellcheck disable=SC2086  # a list of image names
  step "loading into the cluster:$missing" import_into_node "$node" $missing
}

command=${1:-}
[ $# -eq 0 ] || shift
# shellcheck disable=SC2086  # a list of names
[ $# -gt 0 ] || set -- $NAMES
for name in "$@"; do folder_of "$name" >/dev/null; done
case $command in
  build | load) "$command" "$@" ;;
  refs) refs ;;
  *) die "usage: $0 build|load [NAME...] | refs" ;;
esac
