# `make` lists the verbs. Each makes the environment it needs in .venv first and can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo parity-check trajectory test check zoo bench fuzz kills

help:
	@echo "make demo    convert a checkpoint, check its parity, draw what both frameworks see; in demo/"
	@echo "make parity-check    the parity of a synthetic checkpoint (ENTRY=…, of the model zoo); report in parity-report/report"
	@echo "make trajectory    train small models for 20 and 100 steps, R50 for 20 and the loop for 100, beside recorded official trainings; results in parity-report and docs"
	@echo "make test    everything that CI runs: make check, then the tests"
	@echo "make check   ruff, mypy, import contracts"
	@echo "make zoo     prove all 30 official models against the official code's traces, and make the README's table (an hour)"
	@echo "make bench   measure speed and memory; writes docs/benchmarks.md"
	@echo "make fuzz    read 10 000 damaged files of every kind of checkpoint, 500 of the two slow ones (some minutes)"
	@echo "make kills   kill evaluations, TFRecord builds and trainings at 50 random moments each (a quarter of an hour)"

demo: $(VENV)/demo.stamp
	$(BIN)/python -m parity.demo demo

parity-check: ENTRY ?= maskformer_panoptic_R50_bs64_554k
parity-check: $(VENV)/demo.stamp
	mkdir -p parity-report
	$(BIN)/tfmaskformer zoo synthesize $(ENTRY) --dst parity-report/model_final.pkl --force
	$(BIN)/convert --src parity-report/model_final.pkl --dst parity-report/tf_ckpt --config $(ENTRY) --force
	$(BIN)/parity-check --ckpt parity-report/tf_ckpt --reference parity/traces/$(ENTRY) --report parity-report/report

TRAJECTORIES := tiny_panoptic/tiny_panoptic tiny_swin/tiny_swin tiny_swin/tiny_swin_100 maskformer_panoptic_R50_bs64_554k/R50_20 shapes_panoptic/shapes_100

trajectory: $(VENV)/demo.stamp
	mkdir -p parity-report
	for model in tiny_panoptic tiny_swin maskformer_panoptic_R50_bs64_554k; do \
	  $(BIN)/tfmaskformer zoo synthesize $$model --dst parity-report/$$model.pkl --force || exit $$?; \
	done
	cp checkpoints/small/shapes_panoptic.pkl parity-report
	for pair in $(TRAJECTORIES); do \
	  model=$${pair%/*} && name=$${pair#*/} && \
	  $(BIN)/convert --src parity-report/$$model.pkl --dst parity-report/$$model --config $$model --force && \
	  $(BIN)/parity-check steps --ckpt parity-report/$$model --reference tests/golden/trajectory/$$name --json parity-report/$$name.json || exit $$?; \
	done
	$(BIN)/python -m parity.trajectory_figure parity-report/trajectory.png $(TRAJECTORIES:%=parity-report/$$(basename %).json) --results docs/trajectory.json --page docs/training_parity.md

test: check
	$(BIN)/python -m pytest -n 2 --durations=25

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

zoo: $(VENV)/demo.stamp
	$(BIN)/python -m parity.prove --results docs/zoo.json --page README.md

bench: $(VENV)/test.stamp
	$(BIN)/python -m bench

fuzz: $(VENV)/test.stamp
	$(BIN)/python -m tests.converters.fuzz

kills: $(VENV)/test.stamp
	TFMASKFORMER_KILLS=50 $(BIN)/python -m pytest -k "killed_builds or killed_at_random_moments" tests/tfmaskformer/test_data_tfrecords.py tests/tfmaskformer/test_evaluate.py tests/tfmaskformer/test_training_loop.py

$(VENV)/demo.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[cpu]"
	touch $@

$(VENV)/test.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[cpu,aot,test,dev]"
	touch $@ $(VENV)/demo.stamp
