# The commands of this project; CI calls the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install tools serve test test-slow lint format proto bench sweep saturation attention operations curves gpu peers \
	dashboard parity mutations demo image image-test image-tools image-locks image-clean manifests clean

install: $(VENV)/.installed  ## a virtual environment with everything

$(VENV)/.installed: requirements.lock pyproject.toml setup.py $(wildcard models/cpu/*.cpp models/cpu/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

serve: install  ## serve the demo model under Ray Serve
	$(BIN)/headroom serve

tools:  ## programs that tests run: Prometheus, Chromium
	tests/install-tools.sh

test: install tools  ## all tests; those that measure times come last, one after the other
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not alone and not slow"
	$(BIN)/python -m pytest -m "alone and not slow"

test-slow: install tools  ## tests that take minutes each; the cluster of two nodes needs root and iproute2
	$(BIN)/python -m pytest -m slow

lint: install node_modules/.installed  ## format, style, types, layers, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	npx buf lint

node_modules/.installed: package.json
	npm install --no-audit --no-fund --no-package-lock --silent
	touch $@

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: install  ## generated code beside the .proto files
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		protos/headroom/v1/*.proto

bench: install  ## engine alone, standalone and Ray Serve in one run; writes loadtests/results
	$(BIN)/python -m loadtests.fronts

sweep: install  ## key/value heads under load; writes loadtests/results, takes half an hour
	$(BIN)/headroom sweep loadtests/sweeps/kv-heads.yaml
	$(BIN)/python -m loadtests.sweep.picture loadtests/results/kv-heads

saturation: install  ## twice the load that a running server sustains; writes loadtests/results
	$(BIN)/python -m loadtests.saturation

attention: install  ## fused and split attention; writes loadtests/results
	$(BIN)/python -m loadtests.attention

operations: install  ## our operations in C++ and torch's; writes loadtests/results
	$(BIN)/python -m loadtests.operations

curves: install  ## loss against bytes of cache and against heads removed; writes loadtests/results, takes a quarter of an hour
	$(BIN)/python -m loadtests.head_curves

gpu:  ## a GPU: correct? how fast? where does the time go? Writes loadtests/results/gpu, within nine minutes
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m loadtests.gpu

peers: install  ## our engine beside others in one run; writes loadtests/results, takes an hour
	$(BIN)/python -m loadtests.peers

dashboard: install  ## the Grafana dashboard, from its code
	$(BIN)/python -m deploy.grafana.dashboard

parity: install  ## compare every family with transformers; writes docs/parity.md
	$(BIN)/python -m tests.parity.report

mutations: install  ## break the code on purpose, expect red tests; writes docs/mutations.md
	$(BIN)/python -m tests.mutations

# What is finished has a card; what is not goes on where it stopped.
NEW := build/demo
DEVICE := auto
train = test -f $(NEW)/$(1)/MODEL_CARD.md || \
  $(BIN)/headroom train-demo --output $(NEW)/$(1) --device $(DEVICE) $(2)
change = test -f $(NEW)/$(2)/config.json || \
  $(BIN)/headroom $(1) --model $(NEW)/mha --output $(NEW)/$(2) $(3)
uptrain = $(call train,$(1),--start $(NEW)/$(1).untrained --tokens 1 --learning-rate $(2) $(SHARES))
SHARES := --repeat-share 0.2 --needle-share 0.1

demo: install  ## train the bundled models again, into build/demo: minutes on a GPU, hours on processors; goes on where it stopped
	$(call train,mha,--tokens 36 --batch-tokens 16384 --learning-rate 3e-3 $(SHARES) --repeat-growth 0.3)
	$(call change,convert,gqa.untrained,--kv-heads 2)
	$(call uptrain,gqa,5e-4)
	$(call change,convert,mqa.untrained,--kv-heads 1)
	$(call uptrain,mqa,1e-3)
	$(call change,prune,pruned.untrained,--remove 10)
	$(call uptrain,pruned,2e-4)

image:  ## the container image; TARGET=cpu, loadtests or cuda
	deploy/docker/build.sh $(or $(TARGET),cpu)

image-test:  ## run the image confined, ask it for health and a text
	deploy/docker/test.sh

image-tools:  ## what both need on Debian; needs root
	apt-get install --yes --no-install-recommends buildah podman runc catatonit mmdebstrap jq

image-clean:  ## images and layers of the targets above
	deploy/docker/clean.sh

image-locks: .tools/checks/.installed  ## the files that go into the image, with their hashes
	.tools/checks/bin/python -m deploy.docker.lock

manifests: install tools .tools/checks/.installed  ## render and check everything under deploy
	$(BIN)/python -m pytest tests/deploy
	PATH=$$PWD/.tools/checks/bin:$$PATH deploy/checks/manifests.sh

.tools/checks/.installed: deploy/checks/requirements.txt
	$(PYTHON) -m venv .tools/checks
	.tools/checks/bin/python -m pip install --quiet --requirement deploy/checks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) node_modules
