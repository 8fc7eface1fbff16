# Everything from a fresh clone: each target does the set-up that it needs, once.
#
#   make demo    trains a small BERT plain and with MAT on a corpus that every Python carries
#   make test    runs the tests and shows the coverage
#   make bench   measures the probe and the step
#   make soak    the long forms: twenty kills, many random orders of events, ten thousand steps
#   make lint    ruff, mypy, clang-format
#
# PYTHON names the interpreter for .venv; TORCH the torch to install, e.g. TORCH="torch==2.13.0".

PYTHON ?= python3
TORCH ?= torch
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
COMPILED := setup.py pyproject.toml $(wildcard build_tools/*.py csrc/*.* csrc/*/*)

.PHONY: demo test bench soak lint clean distclean FORCE

demo: $(STAMPS)/package
	$(BIN)/python examples/bert_wikitext2.py --demo

# One thread per test process: the machine's cores are shared out among the workers.
test: $(STAMPS)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		--cov=lightning_mat --cov-report=term-missing:skip-covered --cov-fail-under=90 $(ARGS)

bench: $(STAMPS)/package
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/step.py --model bert-small

soak: $(STAMPS)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak tests/soak $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

lint: $(STAMPS)/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	rm -f lightning_mat/_C*.so $(STAMPS)/package
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# An environment that is already there and has pip is kept. Where Python comes without ensurepip,
# the pip outside installs one into the environment.
$(STAMPS)/python:
	@if ! $(PIP) --version >/dev/null 2>&1; then \
		echo "==> creating $(VENV) with $(PYTHON)"; \
		$(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { \
			$(PYTHON) -m venv --clear --without-pip $(VENV) && \
			$(PYTHON) -m pip --python $(BIN)/python install -qq pip; }; \
	fi
	@mkdir -p $(STAMPS) && touch $@

# Changes only when another torch is asked for.
$(STAMPS)/request: $(STAMPS)/python FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(STAMPS)/torch: $(STAMPS)/request
	@echo "==> installing $(TORCH) (about a minute)"
	@$(PIP) install -qq '$(TORCH)'
	@touch $@

# Later steps may not exchange the torch that the extension is compiled against.
$(STAMPS)/package: $(STAMPS)/torch $(COMPILED)
	@echo "==> compiling csrc/ and installing lightning-mat (half a minute, with CUDA two)"
	@$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" \
		> $(STAMPS)/constraints.txt
	@$(PIP) install -qq --constraint $(STAMPS)/constraints.txt --editable '.[report]'
	@$(BIN)/python -c "from lightning_mat._extension import load; e = load(); \
		print('==> compiled for', ', '.join(e.backends) + ':', e.info.get('reason', e.error))"
	@touch $@

$(STAMPS)/dev: $(STAMPS)/package
	@echo "==> installing what the tests need"
	@$(PIP) install -qq --constraint $(STAMPS)/constraints.txt 'lightning-mat[test]'
	@# A torchvision made for another build of torch does not import, and torchmetrics with it.
	@{ $(PIP) install -qq --constraint $(STAMPS)/constraints.txt torchvision timm && \
		$(BIN)/python -c "import torchvision" 2>/dev/null; } || { \
		echo "==> no torchvision fits this torch: the tests that need it are skipped"; \
		$(PIP) uninstall -qq --yes torchvision timm; }
	@touch $@
