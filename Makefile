# The whole set-up on a fresh machine is the first two verbs. `make help` tells the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
# offline: no test may need a model hub; one thread: two workers share two cores; the timeout ends a test that hangs
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests .venv/bin/pytest -p no_skips --timeout 400

demo: install-demo  ## install what serving and simulation need (no torch, < 1 GB) and run the demo: 2 minutes
	.venv-demo/bin/recap demo $(ARGS)

test: install lint types  ## install everything, then lint, types, import rules and the test suite: 10 minutes on two cores
	$(PYTEST) -m "not slow and not gpu and not triton" -n 2 --dist loadfile --no-loadscope-reorder --durations 10

test-all: install lint types  ## the slow tests too (fetches Prometheus' programs from Debian, 30 MB, where they are not on PATH)
	@scripts/prometheus-tools >/dev/null
	$(PYTEST) -m "not gpu and not triton" --durations 20

install-demo:  ## environment .venv-demo: serving, simulator, report
	@scripts/bootstrap demo

install:  ## environment .venv: training, export and the tests as well
	@scripts/bootstrap full

lint: install  ## ruff (rules and format) and the import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

types: install  ## mypy --strict
	.venv/bin/mypy

format: install  ## let ruff rewrite what it can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

loop: install  ## the whole RECAP circle in simulation into runs/loop (45 minutes on two cores)
	.venv/bin/recap loop --out runs/loop $(ARGS)

PROFILE ?= cpu
up:  ## the stack in containers: PROFILE=cpu (default) or gpu; docs/deploy.md
	@scripts/compose-setup
	RECAP_UID=$$(id -u) RECAP_GID=$$(id -g) docker compose --profile $(PROFILE) up --build --detach --wait

down:  ## stop it; rollouts and metrics stay in runs/compose
	docker compose --profile cpu --profile gpu down

sbom: install  ## bill of materials of the locks into dist/sbom
	scripts/sbom

test-triton: install  ## the tests that need a Triton server (installs one from PyPI, 80 MB)
	@scripts/triton-env
	@scripts/prometheus-tools >/dev/null
	$(PYTEST) -m triton tests/triton tests/deploy

test-alerts: install  ## alert rules by promtool, and real Prometheus and Alertmanager over real services
	@scripts/prometheus-tools
	$(PYTEST) -m "not triton" tests/deploy/test_rules.py tests/deploy/test_dashboards.py tests/deploy/test_observability_live.py

soak: install  ## policy and critic under a mixed load for an hour: memory, descriptors and heartbeats watched
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.soak $(ARGS)

fuzz: install  ## a million changed messages through every decoder
	OMP_NUM_THREADS=1 PYTHONPATH=tests .venv/bin/python -m fuzz.run --inputs 1000000 $(ARGS)

assets: install  ## rebuild assets/model_repository, the models that the demo serves
	.venv/bin/recap loop --preset tiny --out runs/assets $(ARGS)
	rm -rf assets/model_repository && cp -r runs/assets/1/models assets/model_repository
	du -sm assets/model_repository

LOCK := uv pip compile -q --no-header --no-emit-index-url --no-annotate --python .venv/bin/python
lock: install  ## recompute requirements/*.txt from the .in files; the demo takes the versions of the full set
	$(LOCK) requirements/full.in -o requirements/full.txt
	$(LOCK) requirements/demo.in -c requirements/full.txt -o requirements/demo.txt

clean:  ## remove caches and builds; keeps environments and runs
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: demo test test-all install-demo install lint types format loop up down sbom test-triton test-alerts soak fuzz assets lock clean help
