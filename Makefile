# Every target does its own set-up: a fresh machine needs Python 3.11 or newer, make and a compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Tests run in so many processes: one thread each for linear algebra, or they fight over the cores.
WORKERS ?= 2
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 VECLIB_MAXIMUM_THREADS=1
# Engines and brokers of tests end before what Java compiles with care pays off; those of benchmarks do not.
SHORT_LIVED_JAVA := JDK_JAVA_OPTIONS='-XX:TieredStopAtLevel=1 -XX:+UseSerialGC'
# What is started once for a group of tests is started by one process.
PYTEST = $(ONE_THREAD) $(SHORT_LIVED_JAVA) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# The lock was resolved on Linux with CPython 3.11. A newer Python may need newer releases than it names
# (the first wheels for that Python), so everywhere else pip resolves pyproject.toml freely.
LOCKED_PLATFORM := import platform as p, sys; \
	sys.exit((p.system(), p.python_implementation(), *sys.version_info[:2]) != ("Linux", "CPython", 3, 11))

# The newest River that Python 3.11 can install, and the two minor versions before it.
RIVER_VERSIONS := 0.26.1 0.25.0 0.24.2

# The engines that pipelines are tested on, of the version of Beam that they were tested with.
BEAM_VERSION := 2.77.0
# Where Maven has no such job server, one is put together from what the pom names: an older Beam for an older Flink.
FLINK_JOB_SERVER := org.apache.beam:beam-runners-flink-2.2-job-server:$(BEAM_VERSION)
FLINK_POM := tests/beam_door/flink/pom.xml
PRISM := .jars/prism/prism

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench river clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Another interpreter: make test PYTHON=python3.13 VENV=.venv-3.13"

demo: $(READY)  ## cluster the NASA shuttle sensor stream and score its anomalies
	$(BIN)/stream-em run configs/shuttle.yaml

test: $(READY) .numba  ## run every test and doctest
	$(PYTEST)

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: compiled

compiled: $(READY) .numba  ## compile the steps that learn events, which else those who use them first do
	$(BIN)/python -c 'from stream_em.compiled_blocks import compile_all; compile_all()'

# Numba looks for changes in a function's own file alone, not in those that its constants and helpers come from.
.numba: $(wildcard stream_em/*.py stream_em/families/*.py)
	@rm -f stream_em/__pycache__/*.nb[ci]
	@touch $@

bench: $(READY)  ## measure speed and memory beside peers
	$(BIN)/python -m benchmarks

.PHONY: chaos soak fuzz

chaos: $(READY)  ## do faults to running jobs and write what was seen into docs/reliability.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.chaos --write

soak: $(READY)  ## learn 100 million events and write how flat memory and speed stay into docs/reliability.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.soak --write

fuzz: $(READY)  ## open 100,000 mutated snapshots and write what became of them into docs/reliability.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.fuzz_snapshots --files 100000 --write

river: $(RIVER_VERSIONS:%=$(VENV)-river-%/.ready)  ## run River's checks and ours on three versions of River
	@for version in $(RIVER_VERSIONS); do \
		echo "River $$version"; \
		$(ONE_THREAD) $(VENV)-river-$$version/bin/python -m pytest -q tests/river_door stream_em/river || exit 1; \
	done

.PHONY: flink-jars prism test-flink test-prism

test-flink: $(READY)  ## run the tests of pipelines on Apache Flink
	@$(MAKE) --no-print-directory flink-jars || echo "Flink cannot be fetched: its tests will be skipped" >&2
	$(PYTEST) -rs -m flink tests/beam_door

test-prism: $(READY) prism  ## run the tests of pipelines on Prism
	$(PYTEST) -rs -m prism tests/beam_door

flink-jars: .jars/flink/.ready  ## fetch Apache Flink and Beam's job server for it, by Maven
	@cat $<

.jars/flink/.ready: $(FLINK_POM)
	@rm -rf $(@D)
	@if mvn --batch-mode --quiet --update-snapshots org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy \
		-Dartifact=$(FLINK_JOB_SERVER) -DoutputDirectory=$(abspath $(@D)) >/dev/null 2>&1; \
	then echo "Flink by $(FLINK_JOB_SERVER)" >$@; \
	else mvn --batch-mode --quiet --file $< -Djars=$(abspath $(@D)) \
			dependency:copy-dependencies -DoutputDirectory=$(abspath $(@D)) jar:jar \
		&& echo "Flink by the jars of $<, since Maven does not find $(FLINK_JOB_SERVER)" >$@; \
	fi

prism: $(PRISM)  ## build Prism, Beam's own engine, in Go

$(PRISM):
	GOBIN=$(abspath $(@D)) go install github.com/apache/beam/sdks/v2/go/cmd/prism@v$(BEAM_VERSION)

.PHONY: kafka-jars test-kafka

test-kafka: $(READY) kafka-jars  ## run the tests of Kafka against a real Kafka broker
	$(PYTEST) -rs -m kafka tests/test_kafka.py tests/cli/test_kafka_run.py tests/beam_door/test_beam_kafka.py

kafka-jars: .jars/kafka/.ready

.jars/kafka/.ready: tests/beam_door/kafka/pom.xml
	@rm -rf $(@D)
	mvn --batch-mode --quiet --file $< dependency:copy-dependencies -DoutputDirectory=$(abspath $(@D))
	@touch $@

clean:  ## remove the virtual environments and every cache
	rm -rf $(VENV) $(VENV)-river-* build dist .hypothesis .mypy_cache .numba .pytest_cache .ruff_cache
	find stream_em tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)-river-%/.ready: pyproject.toml
	@echo "Setting up $(@D) (a minute or two, only once)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cli,river]' 'river==$*' \
		hypothesis pandas polars pytest scikit-learn
	@touch $@

$(READY): pyproject.toml requirements-lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "stream_em needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) (a minute or two, only once)"
	@$(PYTHON) -m venv $(VENV)
	@constraint=''; if $(BIN)/python -c '$(LOCKED_PLATFORM)'; then constraint='-c requirements-lock.txt'; fi; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $$constraint -e '.[dev]'
	@# Tests start hundreds of processes, some where Python is told to keep no bytecode. On all cores, as pip does not; the
	@# tests of packages, and files of other versions of Python that some bring, are left as they are.
	@$(BIN)/python -m compileall -qq -j 0 -x '/(tests|pip|mypy|mypyc|setuptools)/' $(VENV)/lib stream_em || true
	@touch $@
