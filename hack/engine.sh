#!/usr/bin/env bash
# Makes a Docker engine reachable. Called by cluster.sh, node-image.sh, base-image.sh, images.sh.
#
#   hack/engine.sh ensure   nothing to do if an engine answers; else, as root on Debian or Ubuntu,
#                           installs docker.io and starts dockerd, which keeps running afterwards
#   hack/engine.sh stop     stops a dockerd that `ensure` started
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ENGINE_LOG="$CACHE/logs/dockerd.log"
PID_FILE="$CACHE/dockerd.pid"
WRAPPER="$CACHE/engine/runc"
START_SECONDS=60

explain_and_die() {
  case $(host_os) in
    darwin) die "no Docker engine answers" "start Docker Desktop (or Colima, OrbStack), then try again" ;;
    linux) ;;
    *) die "no Docker engine answers, and this system is neither Linux nor macOS" ;;
  esac
  if [ -n "${DOCKER_HOST:-}" ]; then
    die "the Docker engine at DOCKER_HOST=$DOCKER_HOST does not answer" "start it, or unset DOCKER_HOST"
  fi
  if have docker && [ -S /var/run/docker.sock ] && [ ! -w /var/run/docker.sock ]; then
    die "no permission to use the Docker engine" "add yourself to the group docker, or run as root"
  fi
  is_root || die "no Docker engine answers" "start it (for example: sudo systemctl start docker)" \
    "or run this as root, to have one installed and started"
  have apt-get || have dockerd || die "no Docker engine answers, and there is no dockerd to start" \
    "install Docker for this distribution; automatic installation knows Debian and Ubuntu"
}

# install_wrapper: puts the OCI runtime wrapper where dockerd looks for it. It replaces the file and
# does not write into it: it may be running.
install_wrapper() {
  local wrapper
  wrapper="$("$HACK_DIR/go-build.sh" runc-wrapper)/runc-wrapper"
  if cmp -s "$wrapper" "$WRAPPER"; then return 0; fi
  mkdir -p "$(dirname "$WRAPPER")"
  install -m 0755 "$wrapper" "$WRAPPER.new"
  mv "$WRAPPER.new" "$WRAPPER"
}

start_dockerd() {
  local waited=0
  if missing_sys_resource; then
    install_wrapper
    log "CAP_SYS_RESOURCE is missing on this machine: containers run without it"
    set -- --add-runtime "cowhand=$WRAPPER" --default-runtime cowhand
  fi
  log "starting dockerd (log: $ENGINE_LOG)"
  # A new session without our descriptors: it outlives this script and its terminal.
  # shellcheck disable=SC2094
  setsid dockerd --pidfile "$PID_FILE" --log-level warn "$@" </dev/null >>"$ENGINE_LOG" 2>&1 &
  local pid=$!
  until docker_up; do
    waited=$((waited + 1))
    if ! kill -0 "$pid" 2>/dev/null || [ "$waited" -gt "$START_SECONDS" ]; then
      tail -n 20 "$ENGINE_LOG" | sed 's/^/    | /' >&2
      die "dockerd did not start" "the whole log: $ENGINE_LOG"
    fi
    sleep 1
  done
  log "dockerd runs (process $(cat "$PID_FILE"))"
}

ensure() {
  if docker_up; then
    # The cache may have been deleted under a running dockerd.
    if missing_sys_resource && [ ! -x "$WRAPPER" ] &&
      [ "$(docker info -f '{{.DefaultRuntime}}')" = cowhand ]; then install_wrapper; fi
    return 0
  fi
  explain_and_die
  lock engine
  if docker_up; then return 0; fi
  have dockerd || apt_install docker.io
  have docker || die "dockerd is installed, but the docker command is not" "install the Docker client (docker-cli)"
  have iptables || apt_install iptables
  if have systemctl && [ -d /run/systemd/system ]; then
    step "starting the docker service" systemctl start docker
    docker_up || die "the docker service was started but does not answer" "see: journalctl -u docker"
    return 0
  fi
  start_dockerd
}

stop() {
  local pid
  pid=$(cat "$PID_FILE" 2>/dev/null || true)
  if [ -z "$pid" ] || ! kill -0 "$pid" 2>/dev/null; then
    log "no dockerd that was started from here is running"
    return 0
  fi
  kill "$pid"
  while kill -0 "$pid" 2>/dev/null; do sleep 1; done
  log "dockerd stopped"
}

case ${1:-} in
  ensure) ensure ;;
  stop) stop ;;
  *) die "usage: $0 ensure|stop" ;;
esac
