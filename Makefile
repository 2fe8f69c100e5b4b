# Two commands: `make demo` shows it work, `make test` checks it. Both install what they need into .venv.
PYTHON ?= python3
# torch first and alone: on a CPU machine this pin is the CPU build where the registry offers one, on a GPU machine the
# CUDA build. TORCH="torch==X --index-url URL" takes another one.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Of the OpenAI API, on 127.0.0.1.
HTTP ?= 8000
PROMPT ?= Explain in a few sentences why the sky is blue.
READY := .venv/.ready

.PHONY: demo up test check lint protos clean
demo: $(READY)
	@$(BIN)/sequoia demo "$(PROMPT)"

up: $(READY)
	@$(BIN)/sequoia up --http $(HTTP)

test: $(READY) lint
	@$(BIN)/python -m pytest -m "not slow"

# The longer proofs, on top of `make test`.
check: test
	@$(BIN)/python -m pytest -m slow

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code

protos: $(READY)
	@$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. protos/sequoia/v1/*.proto

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Installing into .venv (once, about two minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
