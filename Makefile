# Two commands for a fresh machine with Python, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
PIP := pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test check format bench clean

help:
	@echo "make demo    install the appliance without torch, segment a real scan, show the result"
	@echo "make test    install what the tests need, check the code, run all tests"
	@echo "make check   ruff, mypy --strict, import contracts"
	@echo "make format  let ruff format the code"

$(DEMO_VENV)/done: pyproject.toml constraints.txt CHANGELOG.md
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/$(PIP) -e ".[cpu]"
	touch $@

demo: $(DEMO_VENV)/done
	$(DEMO_VENV)/bin/python docs/first_scan.py

# torch comes first and by its exact version, so that no other package chooses a build for it.
$(VENV)/done: pyproject.toml constraints.txt CHANGELOG.md
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/$(PIP) -e ".[cpu,search,dev]"
	touch $@

check: $(VENV)/done
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Apart from each other, so that native code that fails in one group (three engines beside torch) cannot take another
# with it.
test: check
	$(VENV)/bin/pytest tests/contract
	$(VENV)/bin/pytest tests/acceptance tests/architecture tests/integration
	$(VENV)/bin/pytest tests/unit

format: $(VENV)/done
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

bench: $(VENV)/done
	$(VENV)/bin/python -m benchmarks.cold_start

clean:
	rm -rf $(VENV) $(DEMO_VENV) out
