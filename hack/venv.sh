#!/usr/bin/env bash
# Makes .venv with the pinned dependencies; does nothing when it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

for python in python3.11 python3.12 python3.13 python3; do
  if command -v "$python" >/dev/null 2>&1 && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    break
  fi
  python=
done
if [ -z "${python:-}" ]; then
  echo "error: Python 3.11 or newer is needed (python3 on PATH is older or missing)" >&2
  exit 1
fi

stamp=$(cat operator/dev.lock operator/pyproject.toml hack/uv.lock hack/venv.sh | cksum)
if [ "$(cat .venv/cowhand.stamp 2>/dev/null)" = "$stamp" ] && .venv/bin/python -c 'import cowhand' 2>/dev/null; then
  exit 0
fi
echo "==> .venv ($("$python" --version))" >&2
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r hack/uv.lock
# --no-sources and hashes only: the lock says what is installed, the caller's configuration says from where
.venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes -r operator/dev.lock
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e operator
echo "$stamp" >.venv/cowhand.stamp
