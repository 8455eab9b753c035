# make env    .venv with everything        make demo   the whole line on this machine, about five minutes
# make test   every test that can run here  make lint   ruff, types, import boundaries
# make bench  what the README's numbers come from

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The torch that CI and the demo use. With GPUs, install the build that fits them into .venv first: it is kept.
TORCH ?= torch==2.13.0
BIN := .venv/bin
QUICK := not e2e and not faults and not gpu
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: env demo test unit lint bench faults k8s-files k8s-check infra-check clean

env: .venv/.dev
demo: .venv/.demo
	$(BIN)/losscast demo $(DEMO)

# first what is quick; then what starts services, a file at a time in each process, since much of it waits;
# what trains has one of the two to itself (tests/conftest.py)
test: .venv/.dev
	$(BIN)/python -m pytest tests -m "$(QUICK)" -n 2; quick=$$?; \
	$(BIN)/python -m pytest tests -m "not ($(QUICK))" -n 2 --dist loadfile --durations=40 && exit $$quick

unit: .venv/.dev
	$(BIN)/python -m pytest tests -m "$(QUICK)" -n auto

faults: .venv/.dev
	LOSSCAST_FAULTS=long $(BIN)/python -m pytest tests/faults

lint: .venv/.dev
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# what is applied to a cluster: build, validate strictly, promtool, checkov (its own environment, about a minute to install);
# the part that holds it against schemas reads their folder from LOSSCAST_CRDS, and skips without it
k8s-check: .venv/.dev .venv/.checkov
	LOSSCAST_CHECKOV=$(CURDIR)/.venv/checkov/bin/checkov $(BIN)/python -m pytest -rs tests/k8s tests/launcher/test_kuberay.py \
	    tests/launcher/test_kuberay_pods.py tests/launcher/test_kuberay_client.py tests/launcher/test_kuberay_why.py \
	    tests/launcher/test_cli_kuberay.py tests/monitor/test_alerts.py

# the Azure program under Pulumi's mocks, and its types; Pulumi comes into an environment of its own (510 MB, three minutes)
infra-check: .venv/.pulumi
	PYTHONPATH=$(CURDIR) .venv/pulumi/bin/python -m pytest -rs tests/infra/test_azure_settings.py tests/infra/test_azure_program.py
	.venv/pulumi/bin/basedpyright -p infra/azure/pyrightconfig.json --pythonpath .venv/pulumi/bin/python

k8s-files: .venv/.dev
	$(BIN)/losscast alert rules > k8s/rules/losscast.rules.yaml
	$(BIN)/python -m monitor.prometheus.operator k8s/base/monitor

.venv/.pulumi: .venv/bin/python pyproject.toml
	$(PYTHON) -m venv .venv/pulumi
	.venv/pulumi/bin/pip install -q -c .ci/constraints.txt "pulumi>=3.200,<4" "pulumi-azure-native>=3.10,<4" \
	    "pulumi-kubernetes>=4.18,<5" pydantic pytest basedpyright PyYAML
	@touch $@

.venv/.checkov: .venv/bin/python
	$(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/pip install -q "checkov>=3.2,<4"
	@touch $@

bench: .venv/.dev
	missed=; for f in bench/*.py; do echo "== $$f"; $(BIN)/python $$f || missed="$$missed $$f"; done; \
	[ -z "$$missed" ] || { echo "failed, or missed an aim:$$missed"; exit 1; }

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "losscast: no python3 here. Install Python 3.11 or newer."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "losscast: $(PYTHON) is older than 3.11. Set PYTHON=/path/to/python3.11."; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo "losscast: no C compiler here; DeepSpeed needs one. On Debian: apt-get install build-essential"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel

.venv/.torch: .venv/bin/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	@touch $@

.venv/.demo: .venv/.torch pyproject.toml .ci/constraints.txt
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e ".[train,plot]"
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml .ci/constraints.txt
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e ".[train,plot,parquet,tokenizers,vision,huggingface,lightning,azure,kube,wandb,mlflow,dev]"
	@touch $@ .venv/.demo

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
