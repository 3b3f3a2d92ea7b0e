# make demo: set everything up, then train a small ELECTRA on real text, export it and explain a
#            sentence. make test: the same environment with the test extras, and all tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN ?= runs/demo
SENTENCE ?= the president of the united states sent a message to the congress
HAS_GPU = $(BIN)/python -c 'import sys; from fastelectra.training import launch; \
  sys.exit(launch.device().type == "cpu")'

.PHONY: demo test

# On a CUDA device the run is ELECTRA-small; elsewhere a smaller model, in two processes: on so small
# batches two of one thread are twice as fast as one of two.
demo: $(VENV)/.installed
	$(BIN)/fastelectra prepare --demo --out data/demo
	@if $(HAS_GPU); \
	then ranks="--num_gpus 1"; set -- --config configs/small.json --set data.path=data/demo \
	  --set training.steps=10000 --set optimizer.warmup_steps=1000 --set training.eval_every=1000; \
	else export DS_ACCELERATOR=cpu; ranks="--num_accelerators 2"; \
	  set -- --config configs/demo.json; fi; \
	echo "deepspeed $$ranks fastelectra/train.py $$* --set training.output_dir=$(RUN)"; \
	$(BIN)/deepspeed --log_level error $$ranks fastelectra/train.py "$$@" \
	  --set training.output_dir=$(RUN)
	@rm -rf $(RUN)/export
	$(BIN)/fastelectra export $(RUN) $(RUN)/export
	$(BIN)/fastelectra explain --model $(RUN)/export "$(SENTENCE)"

# Everything on the CPU; then what runs on a GPU, if there is one, or else Triton's interpreter.
# Hypothesis' profile "ci" draws the same examples each time; pytest without it draws others.
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu \
	  $(BIN)/python -m pytest --hypothesis-profile=ci -n 2 --dist loadfile
	@if $(HAS_GPU); \
	then echo on the GPU; set -- tests/training/test_graphs.py tests/tasks/test_step.py; \
	else echo "in Triton's interpreter"; export TRITON_INTERPRET=1; set --; fi; \
	$(BIN)/python -m pytest -n 2 tests/kernels/executed "$$@"

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
