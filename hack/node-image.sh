#!/usr/bin/env bash
# Provides the node image for kind. Called by cluster.sh.
#
#   hack/node-image.sh ensure   prints the image to use; nothing means kind's own default
#   hack/node-image.sh name     prints the name of the self-built image of this tree, built or not
#
# Where images can be pulled, kind's default is used. Elsewhere the image is built: Kubernetes and
# everything around it from Go modules, the system from Debian packages, kind's own base files from
# its module. The first build takes about 15 minutes on two cores; every part is kept in the cache,
# and so is the finished image, so that an interrupted or repeated run continues where it was.
# COWHAND_NODE_IMAGE names an image to use instead; COWHAND_OFFLINE=1 builds without asking.
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

COMPONENTS="kubernetes etcd coredns containerd runc kind local-path-provisioner netpol-agent"
OFFICIAL_PROBE=kindest/node:v$KUBECTL_DOWNLOAD_VERSION

restricted() { if missing_sys_resource; then echo true; else echo false; fi; }

# The tag changes with everything that the image is made from.
image_name() {
  local hash component
  hash=$( (
    cd "$HACK_DIR"
    cat node-image/* node-image.sh
    echo "$KUBERNETES_VERSION $DEBIAN_SUITE"
    for component in $COMPONENTS runc-wrapper; do cat "gomods/$component"/*; done
    restricted
    host_arch
  ) | sha256 - | cut -c1-12)
  echo "cowhand/node:v$KUBERNETES_VERSION-$hash"
}

need_linux_root() {
  if [ "$(host_os)" != linux ] || ! is_root; then
    die "kind's node image cannot be pulled, and building one needs root on Linux" \
      "give the Docker engine access to an image registry, or name an image that it has: COWHAND_NODE_IMAGE=..."
  fi
}

kind_base_files() {
  local dir
  dir=$(cd "$HACK_DIR/gomods/kind" && GOFLAGS='' go mod download sigs.k8s.io/kind &&
    GOFLAGS='' go list -m -f '{{.Dir}}' sigs.k8s.io/kind)
  [ -d "$dir/images/base/files" ] || die "kind's Go module has no images/base/files"
  echo "$dir/images/base/files"
}

# assemble DIR: everything that the Dockerfile copies.
assemble() {
  local dir=$1 files name
  rm -rf "$dir"
  mkdir -p "$dir/bin" "$dir/sbin" "$dir/usr-bin"
  files=$(kind_base_files)
  cp -R "$files" "$dir/files"
  chmod -R u+w "$dir/files"
  cp "$HACK_DIR/node-image/Dockerfile" "$HACK_DIR/node-image/default-storage.yaml" "$dir/"
  cp "$HACK_DIR/node-image/cowhand-netpol.service" "$dir/files/etc/systemd/system/"
  cp "$(built netpol-agent)/netpol-agent" "$dir/bin/"
  for name in containerd containerd-shim-runc-v2 ctr; do cp "$(built containerd)/$name" "$dir/bin/"; done
  for name in kubelet kubeadm kubectl; do cp "$(built kubernetes)/$name" "$dir/usr-bin/"; done
  if [ "$(restricted)" = true ]; then
    cp "$(built runc)/runc" "$dir/sbin/runc.real"
    cp "$(built runc-wrapper)/runc-wrapper" "$dir/sbin/runc"
  else
    cp "$(built runc)/runc" "$dir/sbin/runc"
  fi
}

built() { "$HACK_DIR/go-build.sh" "$1"; }

# single NAME PROGRAM PATH [CHANGE...]: an image that holds one static program.
single() {
  local image=$1 program=$2 path=$3 root change
  shift 3
  root=$(mktemp -d "$CACHE/work/root.XXXXXX")
  mkdir -p "$root$(dirname "$path")" "$root/tmp"
  chmod 0755 "$root"
  chmod 1777 "$root/tmp"
  install -m 0755 "$program" "$root$path"
  if [ "$(basename "$path")" = busybox ]; then # the helper runs scripts
    for change in sh mkdir rm cat ls; do ln -s busybox "$root/bin/$change"; done
    set --
  fi
  tar -C "$root" --numeric-owner --owner=0 --group=0 -c . | docker import "$@" - "$image"
  rm -rf "$root"
}

# component_images DIR: makes the images of the control plane, prints their names.
component_images() {
  local dir=$1 kubernetes image pause
  kubernetes=$(built kubernetes)
  "$kubernetes/kubeadm" config images list --kubernetes-version "v$KUBERNETES_VERSION" 2>/dev/null >"$dir/wanted"
  pause=$(sed -n 's/^ *sandbox_image = "\(.*\)"$/\1/p' "$dir/files/etc/containerd/config.toml")
  [ -n "$pause" ] || die "kind's containerd configuration names no sandbox image"
  gcc -Os -static -o "$dir/pause" "$HACK_DIR/node-image/pause.c"
  : >"$dir/images"
  while read -r image; do
    case $image in
      *pause*) continue ;;
      *coredns*) single "$image" "$(built coredns)/coredns" /coredns --change 'ENTRYPOINT ["/coredns"]' ;;
      *etcd*) single "$image" "$(etcd_program)" /usr/local/bin/etcd ;;
      *kube-proxy*)
        mkdir -p "$dir/proxy"
        cp "$kubernetes/kube-proxy" "$dir/proxy/"
        docker_build -t "$image" -f "$HACK_DIR/node-image/kube-proxy.Dockerfile" "$dir/proxy"
        ;;
      *) single "$image" "$kubernetes/$(basename "${image%%:*}")" "/usr/local/bin/$(basename "${image%%:*}")" ;;
    esac
    echo "$image" >>"$dir/images"
  done <"$dir/wanted"
  single "$pause" "$dir/pause" /pause --change 'ENTRYPOINT ["/pause"]'
  single cowhand/local-path-provisioner:node "$(built local-path-provisioner)/local-path-provisioner" \
    /usr/local/bin/local-path-provisioner
  single cowhand/local-path-helper:node /bin/busybox /bin/busybox
  printf '%s\n' "$pause" cowhand/local-path-provisioner:node cowhand/local-path-helper:node >>"$dir/images"
}

# etcd's main package is the root of its module "server", and so is the program's name.
etcd_program() { echo "$(built etcd)/server"; }

# preload BASE IMAGE DIR: starts the base, imports the images into its containerd, commits it.
preload() {
  local base=$1 image=$2 dir=$3 container=cowhand-node-build
  docker rm -f "$container" >/dev/null 2>&1 || true
  docker run -d --name "$container" --privileged --security-opt seccomp=unconfined \
    --entrypoint sleep "$base" infinity
  docker exec -d "$container" containerd
  # shellcheck disable=SC2016  # expands in the container
  docker exec "$container" bash -c \
    'for i in $(seq 60); do ctr version >/dev/null 2>&1 && exit 0; sleep 0.5; done; exit 1'
  # shellcheck disable=SC2046  # a list of image names
  docker save $(cat "$dir/images") |
    docker exec -i "$container" ctr -n k8s.io images import --no-unpack --label io.cri-containerd.pinned=pinned -
  docker exec "$container" ctr -n k8s.io images list -q
  docker exec "$container" bash -c 'pkill -x containerd; while pgrep -x containerd; do sleep 0.2; done'
  docker commit --change 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]' --change 'CMD []' "$container" "$image"
  docker rm -f "$container"
}

build() {
  local image=$1 tar=$2 dir="$CACHE/work/node-image" base component
  base="${image/node:/node-base:}"
  log "building the node image $image (Kubernetes $KUBERNETES_VERSION)"
  apt_install busybox-static gcc libc6-dev
  for component in $COMPONENTS; do built "$component" >/dev/null; done
  "$HACK_DIR/base-image.sh" ensure >/dev/null
  step "assembling the node image" assemble "$dir"
  step "building the node's system" docker_build -t "$base" --build-arg "RESTRICT_OOM=$(restricted)" \
    --build-arg "KUBERNETES_VERSION=$KUBERNETES_VERSION" "$dir"
  step "making the control plane images" component_images "$dir"
  step "preloading the node image" preload "$base" "$image" "$dir"
  step "keeping the node image in the cache" keep_image "$image" "$tar"
  prune "$tar"
  # shellcheck disable=SC2046  # a list of image names; the node image holds them now
  docker rmi $(cat "$dir/images") >/dev/null 2>&1 || true
  rm -rf "$dir"
}

# prune TAR: removes saved node images other than this one that nobody used for a week.
prune() {
  find "$CACHE/images" -name 'node-*.tar' ! -path "$1" -mtime +7 -exec rm -f {} +
}

ensure() {
  local image tar
  if [ -n "${COWHAND_NODE_IMAGE:-}" ]; then
    echo "$COWHAND_NODE_IMAGE"
    return 0
  fi
  image=$(image_name)
  tar="$CACHE/images/node-${image##*-}.tar"
  if ! image_exists "$image" && [ ! -e "$tar" ] && can_pull "$OFFICIAL_PROBE"; then
    return 0
  fi
  if ! image_exists "$image"; then
    need_linux_root
    lock node-image
    mkdir -p "$CACHE/images" "$CACHE/work"
    if [ -e "$tar" ]; then
      step "loading the node image from the cache" docker load -i "$tar"
    elif ! image_exists "$image"; then
      build "$image" "$tar"
    fi
  fi
  echo "$image"
}

case ${1:-} in
  ensure)
    "$HACK_DIR/engine.sh" ensure
    ensure
    ;;
  name) image_name ;;
  *) die "usage: $0 ensure|name" ;;
esac
