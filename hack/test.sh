#!/usr/bin/env bash
# `make test`: the tests without a cluster run beside the making of the cluster and the tests on it, because each leaves
# the machine idle half of the time. The first lot's output comes at the end; either failing fails the whole.
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cd "$ROOT_DIR"
MAKE=${MAKE:-make}
"$MAKE" --no-print-directory lint verify

report="$CACHE/logs/unit-tests.log"
log "tests without a cluster: running beside what follows; output: $report"
"$MAKE" --no-print-directory unit >"$report" 2>&1 &
unit=$!
trap 'kill "$unit" 2>/dev/null || true' EXIT

rc=0
"$MAKE" --no-print-directory cluster images install e2e || rc=$?
[ "$rc" -eq 0 ] || log "the tests on the cluster failed (exit $rc); waiting for the others"

unit_rc=0
wait "$unit" || unit_rc=$?
trap - EXIT
log "tests without a cluster:"
cat "$report"
if [ "$unit_rc" -ne 0 ] || [ "$rc" -ne 0 ]; then
  die "make test failed" "without a cluster: exit $unit_rc, on the cluster: exit $rc"
fi
log "all tests passed"
