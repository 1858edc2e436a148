#!/usr/bin/env bash
# Installs Cowhand into the cluster of `make cluster` with the chart of this tree; `down` removes it.
#   hack/install.sh up|down|values
# Without ANTHROPIC_API_KEY the scripted model server is installed too and plays Claude's side.
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

RELEASE_NS=${COWHAND_SYSTEM_NAMESPACE:-cowhand-system}
TENANTS=${COWHAND_TENANTS:-default,team-b}
KUBECONFIG_FILE=$("$HACK_DIR/cluster.sh" kubeconfig)
KUBECTL=("$("$HACK_DIR/tools.sh" path kubectl)" --kubeconfig "$KUBECONFIG_FILE")
HELM=("$("$HACK_DIR/tools.sh" path helm)" --kubeconfig "$KUBECONFIG_FILE")

tenants() { printf '%s\n' "$TENANTS" | tr ',' '\n'; }

namespaces() {
  local ns
  for ns in "$RELEASE_NS" $(tenants); do
    "${KUBECTL[@]}" get namespace "$ns" >/dev/null 2>&1 || "${KUBECTL[@]}" create namespace "$ns" >&2
  done
}

# secret NAMESPACE NAME HOSTS KEY: makes or updates the model key's Secret; the key comes on standard input's side, never on a command line.
model_secret() {
  local namespace=$1 hosts=$2 key=$3
  printf '%s' "$key" | "${KUBECTL[@]}" -n "$namespace" create secret generic cowhand-model \
    --from-file=api-key=/dev/stdin --dry-run=client -o yaml |
    "${KUBECTL[@]}" apply --server-side --force-conflicts --field-manager=cowhand-install -f - >/dev/null
  "${KUBECTL[@]}" -n "$namespace" annotate secret cowhand-model --overwrite \
    "cowhand.dev/allowed-hosts=$hosts" >/dev/null
}

scripted_key() {
  local file="$CACHE/model-server-$CLUSTER.key"
  if [ ! -s "$file" ]; then
    (umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' | sed 's/^/sk-scripted-/' >"$file")
  fi
  cat "$file"
}

model() {
  local ns key
  if [ -n "${ANTHROPIC_API_KEY:-}" ]; then
    log "Claude answers (ANTHROPIC_API_KEY is set)"
    for ns in $(tenants); do model_secret "$ns" api.anthropic.com "$ANTHROPIC_API_KEY"; done
    return
  fi
  log "No ANTHROPIC_API_KEY: the scripted model server plays Claude's side"
  key=$(scripted_key)
  printf '%s' "$key" | "${KUBECTL[@]}" -n "$RELEASE_NS" create secret generic cowhand-model-server \
    --from-file=api-key=/dev/stdin --dry-run=client -o yaml |
    "${KUBECTL[@]}" apply --server-side --force-conflicts --field-manager=cowhand-install -f - >/dev/null
  sed "s|IMAGE|$(image_ref model-server)|" "$ROOT_DIR/model-server/deploy.yaml" |
    "${KUBECTL[@]}" -n "$RELEASE_NS" apply --server-side --force-conflicts --field-manager=cowhand-install -f - >&2
  for ns in $(tenants); do
    model_secret "$ns" "cowhand-model-server.$RELEASE_NS.svc:8080" "$key"
  done
}

image_ref() { "$HACK_DIR/images.sh" refs | sed -n "s/^$1=//p"; }

# The values of a development install, on standard output.
values() {
  local ns
  echo "tenants:"
  for ns in $(tenants); do echo "  - $ns"; done
  if [ -z "${ANTHROPIC_API_KEY:-}" ]; then
    printf 'model:\n  baseURL: http://cowhand-model-server.%s.svc:8080\n' "$RELEASE_NS"
  fi
  if [ -f "$ROOT_DIR/hack/dev-values.yaml" ]; then cat "$ROOT_DIR/hack/dev-values.yaml"; fi
}

# CRDs that were applied by hand (kubectl apply -f crds/) become the release's, as Helm asks for it.
adopt_crds() {
  local crd
  for crd in $("${KUBECTL[@]}" get crd -o name | grep '\.cowhand\.dev$' || true); do
    "${KUBECTL[@]}" label "$crd" --overwrite app.kubernetes.io/managed-by=Helm >/dev/null
    "${KUBECTL[@]}" annotate "$crd" --overwrite meta.helm.sh/release-name=cowhand \
      "meta.helm.sh/release-namespace=$RELEASE_NS" >/dev/null
  done
}

up() {
  local file="$CACHE/dev-values-$CLUSTER.yaml"
  namespaces
  adopt_crds
  model
  values >"$file"
  step "helm install cowhand" "${HELM[@]}" upgrade --install cowhand "$ROOT_DIR/charts/cowhand" \
    --namespace "$RELEASE_NS" -f "$CACHE/image-values.yaml" -f "$file" --wait --timeout 5m
  local ns
  for ns in $(tenants); do
    "${KUBECTL[@]}" -n "$ns" rollout status deployment/cowhand-harness --timeout 300s >&2
  done
  if [ -z "${ANTHROPIC_API_KEY:-}" ]; then
    "${KUBECTL[@]}" -n "$RELEASE_NS" rollout status deployment/cowhand-model-server --timeout 300s >&2
  fi
  log "Cowhand runs in namespace $RELEASE_NS, tenants: $TENANTS"
}

down() {
  local purge=()
  if [ "${PURGE:-}" = 1 ]; then purge=(--set purge=true); fi
  if [ ${#purge[@]} -gt 0 ]; then
    "${HELM[@]}" upgrade cowhand "$ROOT_DIR/charts/cowhand" --namespace "$RELEASE_NS" --reuse-values "${purge[@]}" >&2
  fi
  "${HELM[@]}" uninstall cowhand --namespace "$RELEASE_NS" --wait --timeout 5m >&2
  "${KUBECTL[@]}" -n "$RELEASE_NS" delete deployment,service,secret -l app.kubernetes.io/name=cowhand-model-server --ignore-not-found >&2
  log "Cowhand is gone; AgentSessions, the store's volume and the CRDs stay unless PURGE=1 was given"
}

case "${1:-}" in
  up | down | values) "$1" ;;
  *) die "usage: hack/install.sh up|down|values" ;;
esac
