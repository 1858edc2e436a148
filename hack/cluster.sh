#!/usr/bin/env bash
# A kind cluster for demo and tests.
#
#   hack/cluster.sh up           makes it, or brings it back; seconds where it is healthy already
#   hack/cluster.sh down         deletes it
#   hack/cluster.sh kubeconfig   prints the path of its kubeconfig
#
# COWHAND_CLUSTER is its name (default: cowhand). ~/.kube/config is never touched, and no other
# cluster, container or network either.
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

NODE="$CLUSTER-control-plane"
KUBECONFIG="$CACHE/kubeconfig-$CLUSTER"
export KUBECONFIG

# Both kubeadm versions: kind picks one by the version of Kubernetes, and ignores the other patch.
# Leases are long because the machine may be busy: an API server that answers late must not cost
# the controller manager its lease. etcd does not sync: nobody needs this cluster after a power cut.
kind_config() {
  cat <<YAML
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
name: $CLUSTER
networking:
  disableDefaultCNI: $1
nodes:
  - role: control-plane
kubeadmConfigPatches:
  - |
    kind: KubeletConfiguration
    apiVersion: kubelet.config.k8s.io/v1beta1
    failCgroupV1: false
  - |
    kind: ClusterConfiguration
    apiVersion: kubeadm.k8s.io/v1beta3
    etcd:
      local:
        extraArgs:
          unsafe-no-fsync: "true"
    controllerManager:
      extraArgs:
        leader-elect-lease-duration: 30s
        leader-elect-renew-deadline: 20s
        leader-elect-retry-period: 5s
    scheduler:
      extraArgs:
        leader-elect-lease-duration: 30s
        leader-elect-renew-deadline: 20s
        leader-elect-retry-period: 5s
  - |
    kind: ClusterConfiguration
    apiVersion: kubeadm.k8s.io/v1beta4
    etcd:
      local:
        extraArgs:
          - {name: unsafe-no-fsync, value: "true"}
    controllerManager:
      extraArgs:
        - {name: enable-hostpath-provisioner, value: "true"}
        - {name: leader-elect-lease-duration, value: 30s}
        - {name: leader-elect-renew-deadline, value: 20s}
        - {name: leader-elect-retry-period, value: 5s}
    scheduler:
      extraArgs:
        - {name: leader-elect-lease-duration, value: 30s}
        - {name: leader-elect-renew-deadline, value: 20s}
        - {name: leader-elect-retry-period, value: 5s}
YAML
}

# The self-built node image has no kindnet: its pods are joined by the ptp plugin, which is enough
# for one node. It routes each pod through the node and masquerades what leaves the pods' network.
install_cni() {
  local cidr="" waited=0
  until [ -n "$cidr" ]; do
    cidr=$("$KUBECTL" get node "$NODE" -o 'jsonpath={.spec.podCIDR}' --request-timeout=5s 2>/dev/null || true)
    waited=$((waited + 1))
    [ "$waited" -le 60 ] || die "the node $NODE got no pod network" "see: docker logs $NODE"
    [ -n "$cidr" ] || sleep 1
  done
  # A rename inside the folder: containerd ignores a file that is moved in from elsewhere.
  docker exec -i -w /etc/cni/net.d "$NODE" sh -c 'cat >cowhand.new && mv cowhand.new 10-cowhand.conflist' <<JSON
{
  "cniVersion": "0.4.0",
  "name": "cowhand",
  "plugins": [
    {
      "type": "ptp",
      "ipMasq": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni-ipam-state",
        "routes": [{"dst": "0.0.0.0/0"}],
        "ranges": [[{"subnet": "$cidr"}]]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
JSON
}

node_state() {
  local state
  state=$(docker container inspect -f '{{.State.Status}}' "$NODE" 2>/dev/null || true)
  echo "${state:-absent}"
}

# control_plane_fresh: whether cluster DNS and kube-proxy are ready and were started after the node's
# container, and the controller manager leads. After a restart of the node the API server still serves the
# conditions and endpoints from before, until the old leader's lease has run out.
control_plane_fresh() {
  local since
  since=$(docker container inspect -f '{{.State.StartedAt}}' "$NODE" | cut -c1-19)
  {
    "$KUBECTL" -n kube-system get lease kube-controller-manager --request-timeout=5s \
      -o 'jsonpath=true {.spec.renewTime}{"\n"}'
    "$KUBECTL" -n kube-system get pods -l 'k8s-app in (kube-dns, kube-proxy)' --request-timeout=5s -o \
      'jsonpath={range .items[*]}{.status.containerStatuses[0].ready} {.status.containerStatuses[0].state.running.startedAt}{"\n"}{end}'
  } 2>/dev/null | awk -v since="$since" '
    $1 != "true" || substr($2, 1, 19) < since { stale = 1 }
    END { exit stale || NR < 2 }'
}

# dns_current: whether the endpoints of cluster DNS are the pods that run now.
dns_current() {
  local pods endpoints
  pods=$("$KUBECTL" -n kube-system get pods -l k8s-app=kube-dns --request-timeout=5s \
    -o 'jsonpath={range .items[*]}{.status.podIP}{"\n"}{end}' 2>/dev/null | sort)
  endpoints=$("$KUBECTL" -n kube-system get endpointslices -l kubernetes.io/service-name=kube-dns --request-timeout=5s \
    -o 'jsonpath={range .items[*].endpoints[?(@.conditions.ready==true)]}{.addresses[0]}{"\n"}{end}' 2>/dev/null | sort)
  [ -n "$pods" ] && [ "$pods" = "$endpoints" ]
}

healthy() {
  [ -s "$KUBECONFIG" ] || return 1
  "$KUBECTL" get --raw=/readyz --request-timeout=5s >/dev/null 2>&1 || return 1
  [ "$("$KUBECTL" get node "$NODE" --request-timeout=5s \
    -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}' 2>/dev/null)" = True ] || return 1
  control_plane_fresh && dns_current
}

wait_healthy() {
  local deadline=$((SECONDS + $1))
  until healthy; do
    if [ "$SECONDS" -ge "$deadline" ]; then return 1; fi
    sleep 1
  done
}

write_kubeconfig() {
  "$KIND" get kubeconfig --name "$CLUSTER" >"$KUBECONFIG.new" 2>/dev/null || return 1
  chmod 0600 "$KUBECONFIG.new"
  mv "$KUBECONFIG.new" "$KUBECONFIG"
}

# bring_back: tries to get an existing node healthy without making it anew.
bring_back() {
  case $(node_state) in
    running)
      write_kubeconfig || return 1
      if wait_healthy 5; then return 0; fi
      log "the cluster $CLUSTER does not answer yet: waiting"
      if wait_healthy 90; then
        sleep 2 # kube-proxy writes its rules at most once a second
        return 0
      fi
      log "restarting the node $NODE"
      docker restart "$NODE" >/dev/null || return 1
      ;;
    *)
      log "starting the stopped node $NODE"
      docker start "$NODE" >/dev/null || return 1
      ;;
  esac
  write_kubeconfig && wait_healthy 180 || return 1
  sleep 2 # kube-proxy writes its rules at most once a second
}

create() {
  local image=$1 disable_cni=false
  case $image in cowhand/node:*) disable_cni=true ;; esac
  kind_config "$disable_cni" >"$CACHE/kind-$CLUSTER.yaml"
  set -- create cluster --name "$CLUSTER" --config "$CACHE/kind-$CLUSTER.yaml" --kubeconfig "$KUBECONFIG"
  if [ -n "$image" ]; then set -- "$@" --image "$image"; fi
  step "creating the kind cluster $CLUSTER (${image:-kind\'s own node image})" "$KIND" "$@"
  if [ "$disable_cni" = true ]; then install_cni; fi
  step "waiting for the node" "$KUBECTL" wait --for=condition=Ready "node/$NODE" --timeout=180s
  step "waiting for cluster DNS" "$KUBECTL" -n kube-system rollout status deployment/coredns --timeout=180s
  step "waiting for the volume provisioner" \
    "$KUBECTL" -n local-path-storage rollout status deployment/local-path-provisioner --timeout=180s
}

# note_old_image: a running cluster is never replaced unasked, only because the tooling has changed.
note_old_image() {
  local image
  image=$(docker container inspect -f '{{.Config.Image}}' "$NODE")
  case $image in
    "$("$HACK_DIR/node-image.sh" name)") ;;
    cowhand/node:*) log "note: the cluster runs an older node image ($image); renew it with: $0 down && $0 up" ;;
  esac
}

need_tools() {
  KIND=$("$HACK_DIR/tools.sh" path kind)
  KUBECTL=$("$HACK_DIR/tools.sh" path kubectl)
}

up() {
  local image start=$SECONDS
  "$HACK_DIR/engine.sh" ensure
  need_tools
  lock "cluster-$CLUSTER"
  if [ "$(node_state)" != absent ]; then
    if bring_back; then
      note_old_image
      log "the cluster $CLUSTER is up ($((SECONDS - start)) s)"
      return 0
    fi
    log "the cluster $CLUSTER cannot be brought back: making it anew"
    "$KIND" delete cluster --name "$CLUSTER" --kubeconfig "$KUBECONFIG" >&2
  fi
  image=$("$HACK_DIR/node-image.sh" ensure)
  create "$image"
  log "the cluster $CLUSTER is up ($((SECONDS - start)) s); kubeconfig: $KUBECONFIG"
}

down() {
  if ! docker_up; then
    log "no Docker engine answers, so no cluster is running"
    return 0
  fi
  KIND=$("$HACK_DIR/tools.sh" path kind)
  lock "cluster-$CLUSTER"
  "$KIND" delete cluster --name "$CLUSTER" --kubeconfig "$KUBECONFIG" >&2
  rm -f "$KUBECONFIG" "$CACHE/kind-$CLUSTER.yaml"
}

case ${1:-} in
  up) up ;;
  down) down ;;
  kubeconfig)
    [ -s "$KUBECONFIG" ] || die "there is no cluster $CLUSTER" "make it with: make cluster"
    echo "$KUBECONFIG"
    ;;
  *) die "usage: $0 up|down|kubeconfig" ;;
esac
