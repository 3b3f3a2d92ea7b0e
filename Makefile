# make demo: set everything up, then train a small ELECTRA on real text, export it and explain a
#            sentence. make test: the same environment with the test extras, and all tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN ?= runs/demo
SENTENCE ?= the president sent a message to the congress of the united states

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash bench/demo.sh "$(RUN)" "$(SENTENCE)"

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed: make PYTHON=python3.11 …" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: no venv module: apt-get install python3-venv" >&2; exit 2; }

# torch first and by itself: what comes after is built against it and must not replace it.
$(VENV)/.installed: requirements.txt setup.py | $(BIN)/python
	$(PIP) $$(grep '^torch==' requirements.txt)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) runs data build *.egg-info
