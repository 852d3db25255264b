# make serve       run the server with the shipped checkpoint on http://127.0.0.1:8000
# make test        run the test suite
# make test-quick  run the unit tests, without those that take seconds
# make test-long   run slow tests, and property tests with more examples
# make soak        run tests with many replicas, nodes and clients: an hour, one after the other
# make load        load-test URL with loadtest/scenarios/$(SCENARIO).yaml; report in results/$(SCENARIO)
# make chaos       kill and stop replicas under load, FAULTS times, and check that no answer is lost
# make install     create .venv with every extra
# make check       run ruff and mypy
# make image-test  build k8s/Dockerfile without a container engine and test the image (needs root)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= demo
DTYPE ?= auto
DEVICE ?= auto
ARGS ?=
URL ?= http://127.0.0.1:8000
SCENARIO ?= mixed
PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
EXAMPLES ?= long
FAULTS ?= 20

PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: serve test test-quick test-long soak load chaos install check image-test clean

serve: $(VENV)/.installed
	@$(BIN)/blip2-serve up --host $(HOST) --port $(PORT) --model $(MODEL) --dtype $(DTYPE) --device $(DEVICE) $(ARGS)

# Unset, if it is set: the tests start hundreds of processes, and each would compile the package.
test test-quick test-long soak: export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/.installed-test
	$(BIN)/pytest -n $(TEST_WORKERS) -m "not long and not soak" $(PYTEST_ARGS)

test-quick: $(VENV)/.installed-test
	$(BIN)/pytest -n $(TEST_WORKERS) -m "not slow and not long and not soak" tests/unit $(PYTEST_ARGS)

test-long: $(VENV)/.installed-test
	$(BIN)/pytest -n $(TEST_WORKERS) -m "(long or hypothesis) and not soak" --hypothesis-profile=$(EXAMPLES) $(PYTEST_ARGS)

soak: $(VENV)/.installed-test
	$(BIN)/pytest -m soak $(PYTEST_ARGS)

load: $(VENV)/.installed-loadtest
	$(BIN)/locust -f loadtest/locustfile.py --headless --only-summary -H $(URL) --scenario $(SCENARIO) \
		--output results/$(SCENARIO) $(ARGS)

chaos: $(VENV)/.installed-test
	$(BIN)/python -m tests.chaos.run --faults $(FAULTS) $(ARGS)

install: $(VENV)/.installed-test $(VENV)/.installed-dev $(VENV)/.installed-loadtest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

image-test:
	PIP_ARGS="$(PIP_ARGS)" k8s/image-test.sh

clean:
	rm -rf $(VENV)

# One stamp per set of packages; a changed pin reinstalls them all.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (takes minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@$(PIP_INSTALL) -e '.[$*]'
	@touch $@
