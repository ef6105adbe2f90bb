# Two commands for a fresh machine with Python, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
PIP := pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test check bundle audit images check-gpu test-gpu stubs format bench clean

help:
	@echo "make demo    install the appliance without torch, segment a real scan, show the result"
	@echo "make test    install what the tests need, check the code, run all tests"
	@echo "make check   ruff, mypy --strict, import contracts"
	@echo "make check-gpu  mypy --strict of the TensorRT code against its real signatures; needs no GPU"
	@echo "make test-gpu   the tests that need a GPU, in an environment with the [gpu] extra"
	@echo "make bundle  one archive of wheels, zoo and documents that installs without a network, in dist/"
	@echo "make audit   look up known vulnerabilities of every locked version (asks PyPI)"
	@echo "make images  build the runtime image without a Docker engine and try it; needs root"
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

BY_FILE := --dist loadfile --no-loadscope-reorder

GPU_CODE := $(addprefix dints_deploy/runtime/,cuda.py tensorrt_log.py tensorrt_build.py tensorrt_engine.py) tests/gpu

stubs: typings/tensorrt

typings/tensorrt: tests/gpu/stubs.sh
	tests/gpu/stubs.sh typings
	touch $@

check-gpu: $(VENV)/done typings/tensorrt
	MYPYPATH=typings:search $(VENV)/bin/mypy --cache-dir .mypy_cache/gpu $(GPU_CODE)

test-gpu: $(VENV)/done
	$(VENV)/bin/pytest tests/gpu

# Apart from each other, so that native code that fails in one group (three engines beside torch) cannot take another
# with it. The second group waits for daemons and timers more than it computes; its longest files come first. Threads that
# wait for each other do not spin: tests side by side have more of them than there are cores.
test: export OMP_WAIT_POLICY := PASSIVE
test: check
	$(VENV)/bin/pytest tests/contract tests/gpu
	$(VENV)/bin/pytest tests/acceptance tests/architecture tests/integration -n 3 $(BY_FILE)
	$(VENV)/bin/pytest tests/unit -n 2 $(BY_FILE)

format: $(VENV)/done
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

bench: $(VENV)/done
	$(VENV)/bin/python -m benchmarks.cold_start

bundle:
	$(PYTHON) -m release.bundle dist

# A package that could not be looked up counts as a failure. In an environment of its own: its needs are not ours.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

images: $(VENV)/done
	docker/build.sh

clean:
	rm -rf $(VENV) $(DEMO_VENV) .venv-audit dist out
