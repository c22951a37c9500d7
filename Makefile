# The whole pipeline; each target is the plain command it stands for, and prints it. `make` alone lists them.
#
#   make demo                                          everything, small, on a CPU
#   make data BOOK=~/novel.pdf && make prep stage-a stage-b stage-c eval
#
# Settings, as `make stage-b PROFILE=cpu ARGS="--wandb_project=chateau"`:
PYTHON ?= python3.11
BOOK ?=#              address or file of the novel, for `make data` and `make book`
FILES ?=#             how many tables of Gallica's fiction, one a year; default: all
HOLDOUT ?= 0.05#      share of the novel held out; 0 for the last run, on the whole book
PROFILE ?= gpu#       section of train/overrides.yml
CURRICULUM ?= 2#      stage-a trains recipes/2a.yml
STAGE ?= 2c#          of `make export`, `make merge` and `make push`
REPO ?=#              on the hub, as you/name, for `make push`
RUN ?= full#          name of the report
RUNS ?=#              names of reports, for `make compare`
WORDS ?= 800#         how many, for `make continue`
PORT ?= 8000#         of `make notebook`
TORCH ?= auto#        cpu, cuda, or by whether there is an NVIDIA card
ARGS ?=#              more options for the command (not base, book, prep-c, check, merge, compare); words split and quoted as in a shell
# CORPUS_DIR=folder with gallica/, tokenizer/ and book/, for some of the bench targets and tests

# Settings reach the shell as environment variables that recipes quote, never as text of a command: a file name with
# quotes, $, backticks or ; is a file name. `value` keeps make from expanding a $ in them.
SETTINGS := PYTHON BOOK FILES HOLDOUT PROFILE CURRICULUM STAGE REPO RUN RUNS WORDS PORT CORPUS_DIR TORCH ARGS
$(foreach name,$(SETTINGS),$(if $(filter-out undefined,$(origin $(name))),$(eval override export $(name) := $$(value $(name)))))
export AXOLOTL_DO_NOT_TRACK := 1

# `make demo export STAGE=2c`, or RUN=demo: the demo's stages, in demo/run, with its report.
ifneq ($(filter demo,$(MAKECMDGOALS)),)
override export RUN := demo$(subst 2,,$(CURRICULUM))
endif
override IN := $(if $(filter demo demo3,$(RUN)),cd demo/run;)
override UP := $(if $(IN),../../)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

override BIN := .venv/bin
override READY := .venv/ready
override PIP := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps
# Split a setting into the array `more`: xargs reads quotes as a shell does, and runs nothing.
override SPLIT = readarray -d '' -t more < <(xargs -r printf '%s\0' <<<"$$$(1)"); wait $$!;
# Print each command as it would be typed.
override SHOW := PS4='$$ '; set -x;
override WITH_ARGS = $(call SPLIT,ARGS) $(SHOW)

.PHONY: help setup setup-gpu lock data base gallica book prep prep-a prep-b prep-c prep-d stage-a stage-b stage-c stage-d check \
        eval reading export merge push continue compare notebook plan bench-gpu rehearse-prep rehearsal bench-eval bench-faults bench-start bench-train \
        bench-train-long bench-train-start bench-train-instruct bench-preference bench-prep demo clean-demo test test-fast test-slow lint

help: ## This list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

# --- environment ---

setup: $(READY) ## .venv from the hash-locked requirements (5 GB with the CPU build of torch, once)

# The locks are complete, so pip resolves nothing. Without an NVIDIA card the CPU build of torch is taken, where the
# registry offers it (PyPI does not: README says how); with one, or failing that, the CUDA build.
$(READY): requirements/base.txt requirements/cuda.txt requirements/torch-cpu.txt requirements/converter.txt
	@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
		|| { echo "Python 3.11 is needed, and '$$PYTHON' is not it: install python3.11 (with venv), or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv from requirements/ (5 GB with the CPU build of torch, some minutes)"
	@"$$PYTHON" -m venv .venv
	@if { [ "$$TORCH" = cpu ] || { [ "$$TORCH" = auto ] && ! command -v nvidia-smi >/dev/null; }; } && $(PIP) -r requirements/torch-cpu.txt; \
		then $(PIP) -r requirements/base.txt; else $(PIP) -r requirements/base.txt -r requirements/cuda.txt; fi
	@$(PIP) --upgrade --target .venv/converter -r requirements/converter.txt # apart: it brings another `gguf` than base.txt
	@$(BIN)/pip check --disable-pip-version-check
	@echo "$(CURDIR)" > .venv/lib/python3.11/site-packages/chateau.pth # scripts import each other as prep.common
	@touch $@

setup-gpu: $(READY) ## What only a GPU can use: deepspeed, flash-attn (built here by nvcc, an hour); optional
	$(PIP) --no-build-isolation -r requirements/gpu.txt

lock: $(READY) ## Resolve requirements/*.in again
	PATH="$(CURDIR)/$(BIN):$$PATH" requirements/lock.sh

# --- step 0: sources ---

data: base gallica book ## Base model, Gallica files and the novel (BOOK=address or file)
base: $(READY) ## Base model -> models/base
	@$(SHOW) $(BIN)/python prep/collect.py base
gallica: $(READY) ## Gallica's 19,240 works of prose fiction (FILES=N: of N years only) -> data/raw/gallica
	@$(WITH_ARGS) $(BIN)/python prep/collect.py gallica $${FILES:+--files "$$FILES"} "$${more[@]}"
book: $(READY) ## The novel (BOOK=address or file) -> data/raw/book
	@test -n "$$BOOK" || { echo "say which novel: make book BOOK=https://... or BOOK=path/to/novel.pdf" >&2; exit 1; }
	@$(SHOW) $(BIN)/python prep/collect.py book --source="$$BOOK"

# --- steps 1a, 1b, 1c: rows ---

prep: prep-a prep-b prep-c ## All training rows
prep-a: $(READY) ## 1,000,000 windows of 512 tokens of Gallica -> data/2a.jsonl
	@$(WITH_ARGS) $(BIN)/python prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 512 --windows 1000000 --split 1/2 --seed 42 --out data/2a.jsonl "$${more[@]}"
prep-b: $(READY) ## 250,000 windows of 2048 tokens of Gallica -> data/2b.jsonl
	@$(WITH_ARGS) $(BIN)/python prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 2048 --windows 250000 --split 2/2 --seed 42 --out data/2b.jsonl "$${more[@]}"
prep-c: $(READY) ## The novel in four phases -> data/2c.jsonl
	@book=$$(ls data/raw/book/book.*) || { echo "no novel yet: make book BOOK=..." >&2; exit 1; }; \
		$(SHOW) $(BIN)/python prep/castle.py --book "$$book" --tokenizer models/base --sequence-len 2048 --stride 512 --holdout "$$HOLDOUT" --seed 42 --out data/2c.jsonl

prep-d: $(READY) ## Optional: what 2c writes in the novel's places, beside the author -> data/2d.jsonl
	@$(WITH_ARGS) $(BIN)/python prep/pairs.py "$${more[@]}"

# --- steps 2a, 2b, 2c: training ---

stage-a: stage-%: $(READY) ## Train 2a: every weight, windows of 512 tokens (CURRICULUM=3: 3a, recipes/second-curriculum.md)
stage-b: stage-%: $(READY) ## Train 2b: a QLoRA adapter, windows of 2048
stage-c: stage-%: $(READY) ## Train 2c: the same adapter, on the novel
stage-d: stage-%: $(READY) ## Optional: train 2d: the same adapter, the author preferred to 2c (recipes/README.md)
stage-a stage-b stage-c stage-d: stage-%:
	@$(WITH_ARGS) $(BIN)/python train/stage.py "$${CURRICULUM}$*" --profile "$$PROFILE" -- "$${more[@]}"

check: $(READY) ## Did every stage train? The gates, on whatever is there
	@$(SHOW) $(BIN)/python train/gate.py

# --- evaluation ---

eval: $(READY) ## Score and sample base and stages -> eval/reports/RUN.json, .md and pictures
	@$(WITH_ARGS) $(BIN)/python eval/evaluation.py --recipes recipes --curriculum "$$CURRICULUM" --run "$$RUN" --out eval/reports "$${more[@]}"

reading: $(READY) ## Whose passage is it? A page of pairs for readers; make eval counts their answers -> eval/reports/RUN.reading.html
	@$(WITH_ARGS) $(BIN)/python eval/reading.py --recipes recipes --curriculum "$$CURRICULUM" --run "$$RUN" --out eval/reports "$${more[@]}"

export: $(READY) $(filter demo,$(MAKECMDGOALS)) ## STAGE to share, and proved: 16-bit model, GGUF files, model card -> outputs/export/2c
	@$(IN) $(WITH_ARGS) $(UP)$(BIN)/python $(UP)eval/export.py "$$STAGE" --recipes $(UP)recipes --report "$(UP)eval/reports/$$RUN.json" "$${more[@]}"

merge: $(READY) ## Of these the 16-bit model alone
	@$(IN) $(SHOW) $(UP)$(BIN)/python $(UP)eval/export.py "$$STAGE" --recipes $(UP)recipes --report "$(UP)eval/reports/$$RUN.json" --forms model

push: $(READY) ## The export to REPO on the hub, private: lists what would go; ARGS=--yes sends it
	@$(IN) $(WITH_ARGS) $(UP)$(BIN)/python $(UP)eval/push.py "$$STAGE" "$$REPO" "$${more[@]}"

continue: $(READY) ## Write WORDS more words of the novel with the last stage -> outputs/continuation
	@$(WITH_ARGS) $(BIN)/python eval/continuation.py --recipes recipes --curriculum "$$CURRICULUM" --words "$$WORDS" "$${more[@]}"

compare: $(READY) ## Several reports in one page: make compare RUNS="small full" -> eval/reports/compare.html
	@test -n "$$RUNS" || { echo 'say which reports: make compare RUNS="small full"' >&2; exit 1; }
	@$(call SPLIT,RUNS) $(SHOW) $(BIN)/python eval/compare.py --reports eval/reports -- "$${more[@]}"

notebook: $(READY) ## Watch trainings, write with the stages, read reports: a page on PORT, for this machine alone
	@$(WITH_ARGS) $(BIN)/python eval/serve.py --port "$$PORT" "$${more[@]}"

# --- measurements ---

plan: $(READY) ## Will the recipes fit? Planned memory, without a GPU (ARGS="--base models/base recipes/2a.yml")
	@$(WITH_ARGS) $(BIN)/python train/memory.py "$${more[@]}"

bench-gpu: $(READY) ## Speed and memory of recipes and ablations on a GPU -> bench/reports/gpu.md (run again to resume)
	@$(WITH_ARGS) $(BIN)/python bench/gpu.py "$${more[@]}"

rehearse-prep: $(READY) ## The rows of the real run, from 5 GB of books made of CORPUS_DIR's novels, and two steps on them -> bench/reports/rehearsal-prep.md
	@$(WITH_ARGS) $(BIN)/python bench/rehearsal.py --library "$$CORPUS_DIR/gallica" --tokenizer "$$CORPUS_DIR/tokenizer" \
		--only collect texts library prepare preprocess train --work bench/run/rehearsal-prep --out bench/reports/rehearsal-prep.json "$${more[@]}"

rehearsal: $(READY) ## The whole way with a base of TinyLlama's size, two steps a stage: time, memory, disk -> bench/reports/rehearsal.md
	@$(WITH_ARGS) $(BIN)/python bench/rehearsal.py "$${more[@]}"

bench-eval: $(READY) ## What evaluation costs, beside lm-eval's own command, on the demo's models -> bench/reports/eval.json
	@cd demo/run; $(WITH_ARGS) ../../$(BIN)/python ../../bench/compare_with_lm_eval.py --recipes ../../recipes "$${more[@]}"

bench-faults: $(READY) ## Kills, damaged files, full disks: what comes of the same command -> bench/reports/faults.md (hours; run again to resume)
	@$(WITH_ARGS) $(BIN)/python bench/faults.py "$${more[@]}"

bench-start: $(READY) ## What quantisation costs, and what an adapter's start gives back, on the demo's 2a -> bench/reports/adapter_start.md
	@cd demo/run; $(WITH_ARGS) ../../$(BIN)/python ../../bench/adapter_start.py "$${more[@]}"

bench-train: $(READY) ## Which settings learn: bench/train.yml on a CPU -> bench/reports/train.md (CORPUS_DIR=folder; hours)
bench-train-long: $(READY) ## The same on three times the tokens, a few variants -> bench/reports/train-long.md
bench-train-start: $(READY) ## How an adapter should start, and how 2a should end -> bench/reports/train-start.md
bench-train-instruct: $(READY) ## The second curriculum's settings, on the demo's articles, after `make demo CURRICULUM=3`
bench-preference: $(READY) ## Which preference loss mends the demo's 2c without forgetting -> bench/reports/preference.md
bench-train bench-train-long bench-train-start bench-train-instruct bench-preference: bench-%:
	@$(WITH_ARGS) $(BIN)/python bench/sweep.py --plan bench/$*.yml "$${more[@]}"

bench-prep: $(READY) ## Speed and memory of the preparation beside the naive method (CORPUS_DIR) -> bench/reports/prep.json
	@test -n "$${CORPUS_DIR-}" || { echo 'say where the corpus is: make bench-prep CORPUS_DIR=folder' >&2; exit 1; }
	@$(SHOW) $(BIN)/python bench/prep_speed.py --source "$$CORPUS_DIR/gallica" --tokenizer "$$CORPUS_DIR/tokenizer"

# --- small and local ---

demo: $(READY) ## All of the above, small, on a CPU, in demo/run: half an hour to an hour on two cores (CURRICULUM=3: the second, 9 to 17 minutes)
	@"demo/demo$${CURRICULUM#2}.sh"

clean-demo: ## Remove what the demo made; texts that you kept or continued stay in demo/run/outputs
	@[ ! -d demo/run ] || find demo/run -depth -mindepth 1 \
		! -path demo/run/outputs ! -path 'demo/run/outputs/kept*' ! -path 'demo/run/outputs/continuation*' -delete
	@[ ! -d demo/run ] || find demo/run -depth -type d -empty -delete

test: lint ## Every test, the real Axolotl among them (CORPUS_DIR=folder adds those that need a corpus)
	@echo "Four parts, two at a time, a thread each; each prints when it ends, in some minutes"
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 --output-sync test-others test-smoke test-fast test-second_curriculum

test-fast: $(READY) ## The tests that train and evaluate nothing
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY) ## The others: training, evaluation, the browser
	$(BIN)/python -m pytest -m slow

# The parts of test-slow, for `make test`.
.PHONY: test-others test-smoke test-second_curriculum
test-smoke test-second_curriculum: test-%: $(READY)
	$(BIN)/python -m pytest -m slow tests/test_$*.py
test-others: $(READY)
	$(BIN)/python -m pytest -m slow --ignore=tests/test_smoke.py --ignore=tests/test_second_curriculum.py

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
