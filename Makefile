# The one front door: `make help` lists it. `make demo` and `make test` need nothing but Docker (or root on Debian), Python 3.11 and this folder.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PYTHONSAFEPATH := 1
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -p no:cacheprovider

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}'

.PHONY: demo
demo: setup cluster images install ## Everything from nothing: cluster, images, install, a real session, its events on the terminal
	$(PY) hack/demo.py

.PHONY: test
test: lint verify unit cluster images install e2e ## Everything from nothing: all tests

.PHONY: setup
setup: ## Make .venv with the pinned dependencies
	@hack/venv.sh

.PHONY: cluster
cluster: ## Start the kind cluster (or find it running)
	@hack/engine.sh ensure && hack/tools.sh ensure && hack/cluster.sh up

.PHONY: kubeconfig
kubeconfig: ## Print the path of the cluster's kubeconfig, alone
	@hack/cluster.sh kubeconfig

.PHONY: images
images: setup ## Build the images and load them into the cluster
	@hack/images.sh build && hack/images.sh load

.PHONY: install
install: setup ## Install Cowhand (and the scripted model server, unless ANTHROPIC_API_KEY is set) with Helm
	@hack/install.sh up

.PHONY: uninstall
uninstall: ## Remove Cowhand from the cluster; resources and the log stay (PURGE=1 removes them too)
	@hack/install.sh down

.PHONY: unit
unit: setup ## Tests without a cluster: unit, contract, integration, adversarial, chart
	@hack/test-packages.sh ensure && hack/store.sh ensure valkey >/dev/null && hack/store.sh ensure redis >/dev/null && hack/tools.sh ensure
	$(PYTEST) -n 4 --dist loadfile --no-loadscope-reorder -m "not e2e and not apiserver" tests
	@hack/test-packages.sh go

.PHONY: soak
soak: setup ## 2000 simulated histories with faults (COWHAND_SEEDS), every broken connection, every killed process, every control
	@hack/store.sh ensure >/dev/null
	COWHAND_SEEDS=$${COWHAND_SEEDS:-2000} COWHAND_SOAK_S=$${COWHAND_SOAK_S:-1800} COWHAND_CHAOS=all $(PYTEST) -n 2 --dist loadfile tests/simulation tests/chaos tests/integration/session/test_cluster.py

.PHONY: e2e
e2e: setup ## Tests on the cluster (needs cluster, images, install)
	$(PYTEST) -n 3 --dist loadgroup -m "(e2e or apiserver) and not disruptive" -x --timeout 600 tests
	$(PYTEST) -m disruptive -x --timeout 600 tests

.PHONY: bench
bench: setup ## Measure everything, print the table, write bench/results.json and docs/performance (needs cluster, images, install)
	$(PY) bench/run.py
	$(PY) bench/report.py

.PHONY: bench-local
bench-local: setup ## The figures that need no cluster and the failover table, at most 8 minutes (SECONDS_BENCH=480)
	@hack/store.sh ensure valkey >/dev/null && hack/store.sh ensure redis >/dev/null
	$(PY) bench/local.py --seconds $${SECONDS_BENCH:-480}; code=$$?; $(PY) bench/report.py && exit $$code

.PHONY: lint
lint: setup ## ruff, mypy, import-linter, shellcheck
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy operator/src sandbox-image/src model-server/src
	.venv/bin/lint-imports --no-cache
	.venv/bin/shellcheck -x hack/*.sh

.PHONY: generate
generate: setup ## Write the generated files: crds/, the chart's copies, docs/api.md, docs/performance/
	$(PY) -m cowhand.api.generate .
	$(PY) bench/report.py

.PHONY: verify
verify: setup ## Fail if a generated file is not what `make generate` writes
	$(PY) -m cowhand.api.generate --check .
	$(PY) bench/report.py --check

.PHONY: clean
clean: ## Delete the cluster and .venv (CACHE=1 also stops the engine that was started here and removes the caches)
	@hack/cluster.sh down
	@if [ "$(CACHE)" = 1 ]; then hack/engine.sh stop; fi
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@if [ "$(CACHE)" = 1 ]; then rm -rf "$${COWHAND_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/cowhand}"; fi
