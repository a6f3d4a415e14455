# make demo: the main job on the embedded default.  make test: the tests but the slow ones.  .ci/run: everything.  All make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests benchmarks examples tools

.PHONY: demo test test-all test-lowest lint docs wheel clean
demo: $(VENV)/.installed-demo
	$(BIN)/anybatch demo

test: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow and not distributed'

test-all: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The core's tests with the lowest versions that pyproject.toml claims, but torch, which is the pinned one.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install -q $$(grep '^torch==' constraints.txt)
	$(VENV)-lowest/bin/pip install -q $$($(PYTHON) tools/lowest.py) pytest hypothesis pillow
	PYTHONPATH=src:. HF_HUB_OFFLINE=1 $(VENV)-lowest/bin/python -m pytest -m 'not slow and not distributed' \
	    tests/core tests/plans tests/mining/test_mining.py tests/mining/test_compiled.py tests/integrations/test_card.py \
	    tests/cli/test_options.py

lint: $(VENV)/.installed-test
	$(BIN)/pip install -q -c constraints.txt -e '.[lint]'
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright

docs: $(VENV)/.installed-test
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

wheel:
	PYTHON=$(PYTHON) .ci/wheel

# torch goes first and alone: with its pin in place nothing below can pull another build of it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.installed-demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest
