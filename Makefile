# Every target does its own set-up: the environment lives in .venv.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Tests at a time, each with stores of its own. WORKERS=0 runs them one after the other, in one
# process, for a debugger. The whole suite waits for a third of its time, so that two cores have room
# for three.
ifeq ($(origin WORKERS),undefined)
WORKERS := 2
test test-debian: WORKERS := 3
endif
PYTEST = $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal
# What only Debian's packages have is installed, or named, before anything runs.
PACKAGES := tests/install_packages.sh
PROTOS := $(shell find protos -name '*.proto') protos/outbox/v1/service_config.json
# The client's distribution owns all generated code: the stubs, and the blocking client.
STUBS := client/src/outbox/v1/outbox.binpb
# The contract as it was last released, as an image of buf: neither git history nor a network is
# needed to compare with it. The first one was recorded before the first release, when the names
# were final: since then nothing in outbox.v1 may be renamed, renumbered or removed.
RELEASED := .ci/released-contract.binpb
# Python keeps what it compiles. The tests start hundreds of processes, and each would compile all
# modules again.
unexport PYTHONDONTWRITEBYTECODE
ASYNC := $(wildcard client/src/outbox_client/_async/*.py)

.PHONY: help
help: ## Print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

.venv/packages: requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(STUBS): .venv/packages client/hatch_build.py $(PROTOS) $(ASYNC)
	$(BIN)/python client/hatch_build.py

$(READY): .venv/packages $(STUBS) pyproject.toml client/pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --editable client --editable .
	@touch $@

.PHONY: protos
protos: $(STUBS) ## Generate the protobuf and gRPC code

.PHONY: setup
setup: $(READY) ## Make the environment in .venv

.PHONY: demo
demo: $(READY) ## Run the main job: a CSV becomes paced mail in an inbox, and is checked
	$(BIN)/outbox demo

.PHONY: faketime
faketime:
	@$(PACKAGES) curl faketime jq pgbouncer

.PHONY: test
test: faketime $(READY) ## Run the tests on real servers (not test-deploy, test-mail-servers)
	$(PYTEST)

.PHONY: test-unit
test-unit: $(READY) ## Run the tests that need no server
	$(PYTEST) tests/unit

.PHONY: test-properties
test-properties: $(READY) ## Run the property tests with 500 examples each, instead of 50
	OUTBOX_TEST_EXAMPLES=500 $(PYTEST) -m hypothesis tests/unit

.PHONY: test-search
test-search: $(READY) ## Search for bugs of the queue and the calls with ten times the examples
	OUTBOX_TEST_EXAMPLES=500 $(PYTEST) -m hypothesis tests/integration/queue tests/service/test_fuzz.py

.PHONY: debian-stores
debian-stores:
	@$(PACKAGES) curl faketime postgresql-15 redis-server

.PHONY: test-debian
test-debian: debian-stores $(READY) ## Run the tests on Debian's PostgreSQL 15 and Redis 7.0
	OUTBOX_TEST_STORES=debian $(PYTEST)

.PHONY: mail-servers
mail-servers: ## Unpack Debian's Postfix, Exim and OpenSMTPD into build/mail-servers
	tests/mail_servers/install.sh

.PHONY: test-mail-servers
test-mail-servers: $(READY) ## Run the tests with them (as root, after make mail-servers)
	$(PYTEST) tests/mail_servers

# Debian's Go, because there may be no module proxy; its gRPC is that of 2020.
.PHONY: client-packages
client-packages:
	@$(PACKAGES) protobuf-compiler golang-go golang-google-grpc-dev golang-google-genproto-dev \
	  golang-google-protobuf-dev golang-github-golang-protobuf-1-5-dev protoc-gen-go-1-5 \
	  protoc-gen-go-grpc protobuf-compiler-grpc-java-plugin libgrpc-java libprotobuf-java \
	  libnetty-java libperfmark-java libguava-java libgoogle-gson-java \
	  libgeronimo-annotation-1.3-spec-java
	@command -v javac >/dev/null || $(PACKAGES) default-jdk-headless
	@command -v npm >/dev/null || $(PACKAGES) nodejs npm

.PHONY: test-clients
test-clients: client-packages $(READY) ## Build clients in Go, Node and Java from protos/, and run them
	tests/clients/build_go.sh
	tests/clients/build_java.sh
	npm --prefix tests/clients/node ci --no-progress --no-audit --no-fund
	$(BIN)/pytest --numprocesses 0 tests/clients

# Checkov's dependencies are more than all of ours, so it has an environment of its own.
build/checkov/ready: tests/deploy/checkov.lock
	$(PYTHON) -m venv build/checkov
	build/checkov/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

.PHONY: deploy-packages
deploy-packages:
	@$(PACKAGES) iproute2 prometheus systemd

.PHONY: test-deploy
test-deploy: deploy-packages build/checkov/ready $(READY) ## Check (as root) image, chart, manifests, compose file and units
	$(PYTEST) tests/deploy

.PHONY: test-containers
test-containers: $(READY) ## Build the image, and run the chart's pods in containers (as root)
	tests/containers/run.sh

.PHONY: test-image
test-image: $(READY) ## The short form of it for CI: the image, the main job, SIGTERM and a restart
	tests/containers/run.sh --short

.PHONY: manifests
manifests: $(READY) ## Render the chart to deploy/manifests, and list the settings in its schema
	$(BIN)/python -m outbox_server.deploy.chart

.PHONY: drill
drill: $(READY) ## Kill the parts of a private stack at random for a minute, and audit it
	$(BIN)/outbox drill --minutes 1 --seed 1

.PHONY: pgbouncer
pgbouncer:
	@$(PACKAGES) pgbouncer

.PHONY: drill-stores
drill-stores: pgbouncer $(READY) ## The same on a Redis Cluster, PgBouncer and a PostgreSQL that fails over
	$(BIN)/outbox drill --minutes 0.6 --seed 13 --stores cluster

.PHONY: drill-production
drill-production: $(READY) ## The same with TLS, keys and secrets in files, and rolling restarts
	$(BIN)/outbox drill --production --minutes 1 --seed 1

# Both source trees run in this environment, so its libraries must suit both.
.PHONY: test-side-by-side
test-side-by-side: $(READY) ## Run BASE=COMMIT beside this tree under load: upgrade, roll back, audit
	rm -rf build/base && mkdir -p build/base
	git archive $(BASE) | tar -x -C build/base
	$(BIN)/python build/base/client/hatch_build.py
	$(BIN)/python -m tests.side_by_side build/base

.PHONY: luacheck
luacheck:
	@$(PACKAGES) lua-check

.PHONY: lint
lint: luacheck $(READY) ## Check style, types, protos and import boundaries
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m outbox_server.shared.queue.scripts build/lua
	luacheck --quiet --std lua51 --read-globals redis KEYS ARGV cmsgpack --ignore 211 231 311 --max-line-length 100 build/lua
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code --path protos/outbox
	$(BIN)/buf breaking --against $(RELEASED)

.PHONY: alerts
alerts: ## Check the alert rules and run their tests (promtool)
	@$(PACKAGES) prometheus
	promtool check config deploy/prometheus/prometheus.yml
	promtool test rules deploy/prometheus/outbox.tests.yml

.PHONY: fire-alerts
fire-alerts: $(READY) ## Make every alert fire in a real Prometheus, by real trouble (minutes)
	@$(PACKAGES) prometheus
	$(BIN)/python -m tests.firing_alerts

.PHONY: dashboard
dashboard: $(READY) ## Write the Grafana dashboard, deploy/grafana/outbox.json
	$(BIN)/python -m outbox_server.deploy.grafana.dashboard

.PHONY: release-contract
release-contract: $(READY) ## Record the protos as released: lint refuses to break them (part of a release)
	$(BIN)/buf build --path protos/outbox --exclude-source-info --output $(RELEASED)

.PHONY: release-revision
release-revision: $(READY) ## Record the schema of this version: later migrations may only expand it
	$(BIN)/python -m release.revisions

.PHONY: release
release: $(READY) ## Build all that a release publishes, from the commit, into build/release
	$(BIN)/python -m release

.PHONY: sbom
sbom: $(READY) ## Write the bill of materials of production, checked, to build/sbom.cdx.json
	@mkdir -p build
	$(BIN)/python -m release.sbom > build/sbom.cdx.json

.PHONY: licenses
licenses: $(READY) ## Print the licences of the production dependencies
	@$(BIN)/python -m release.licenses

# pip-audit asks PyPI for known vulnerabilities, so this needs a network. It is not in our lock file
# because it is only run here.
.PHONY: audit-dependencies
audit-dependencies: $(READY) ## Ask PyPI for known vulnerabilities of the production dependencies
	@mkdir -p build
	$(BIN)/python -m release.dependencies > build/production.txt
	$(PYTHON) -m venv build/pip-audit
	build/pip-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	build/pip-audit/bin/pip-audit --strict --require-hashes --disable-pip --requirement build/production.txt

.PHONY: docs
docs: $(READY) ## Write docs/api.md, docs/openapi.json and the service config from the protos
	$(BIN)/python docs/build_service_config.py
	$(BIN)/python docs/build_api_reference.py
	$(BIN)/python docs/build_openapi.py

.PHONY: bench
bench: $(READY) ## Measure all, or ROWS="lists idle"; SHORT=1: the short form; DOCS=1: also write docs/
	$(BIN)/python -m bench $(ROWS) $(if $(SHORT),--short) $(if $(DOCS),--docs)

.PHONY: bench-guard
bench-guard: $(READY) ## Fail if a mail or a row costs much more than recorded, relative to bare probes
	$(BIN)/python -m bench.guard

.PHONY: bench-guard-record
bench-guard-record: $(READY) ## Record what mails and rows cost now, after a change that is meant
	$(BIN)/python -m bench.guard --record

LOCK := uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --universal \
  --python-version 3.11

.PHONY: lock
lock: ## Resolve the dependencies again (needs uv)
	$(LOCK) --no-emit-package outbox-client --all-extras pyproject.toml --output-file requirements.lock
	$(LOCK) --no-emit-package outbox-client --constraint requirements.lock --extra cli --extra gateway \
	  pyproject.toml --output-file deploy/image/production.lock
	$(LOCK) --constraint requirements.lock deploy/image/build.in --output-file deploy/image/build.lock
	$(LOCK) tests/deploy/checkov.in --output-file tests/deploy/checkov.lock
	$(LOCK) tests/containers/compose.in --output-file tests/containers/compose.lock
