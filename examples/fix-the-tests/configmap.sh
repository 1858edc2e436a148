#!/bin/sh
# Prints the ConfigMap fix-the-tests-repo: the sample repository with one of three bugs in it.
#
#   ./configmap.sh [prices|stock|pages|none]     without an argument the bug is drawn at random
#
# KUBECTL names another kubectl. No cluster is needed.
set -eu
cd "$(dirname "$0")"

variant=${1:-}
if [ -z "$variant" ]; then
  number=$(od -An -N2 -tu2 /dev/urandom | tr -d ' ')
  case $((number % 3)) in
    0) variant=prices ;;
    1) variant=stock ;;
    2) variant=pages ;;
  esac
fi
case $variant in
  prices | stock | pages | none) ;;
  *)
    echo "usage: $0 [prices|stock|pages|none]" >&2
    exit 2
    ;;
esac

module() {
  if [ "$1" = "$variant" ]; then echo "variants/$1.py"; else echo "repo/shop/$1.py"; fi
}

exec "${KUBECTL:-kubectl}" create configmap fix-the-tests-repo --dry-run=client --output=yaml \
  --from-file=shop-init.py=repo/shop/__init__.py \
  --from-file=shop-pages.py="$(module pages)" \
  --from-file=shop-prices.py="$(module prices)" \
  --from-file=shop-stock.py="$(module stock)" \
  --from-file=tests-init.py=repo/tests/__init__.py \
  --from-file=tests-pages.py=repo/tests/test_pages.py \
  --from-file=tests-prices.py=repo/tests/test_prices.py \
  --from-file=tests-stock.py=repo/tests/test_stock.py
