"""The whole way at its true size, each stage trained for two steps: what every command takes in time, memory and disk.

    make rehearsal                                                        on a CPU, a step of one window
    make rehearsal ARGS="--profile gpu --tokenizer FOLDER"                on a card, the recipes as they are
    make rehearse-prep CORPUS_DIR=FOLDER                                  a library and rows as many as the recipes' instead

The base is TinyLlama's architecture (train/tinyllama.json) with random weights; the rows come from the demo's texts by the
demo's commands, or, with --library, from 5 GB of books made from the novels there (bench/prep_speed.py). Each stage is killed
at its first checkpoint and resumed by the same command. What a step takes says little of a whole training on a CPU; loading,
checking, checkpoints, evaluation and export take here what they will take there.
Everything is made in bench/run/rehearsal; run it again and it continues. Writes bench/reports/rehearsal.json and .md, with
--profile gpu rehearsal-gpu.json.
"""

from prep.command import run

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from bench.common import resumed, write_report
from bench.gpu import machine, made_by
from eval.tables import markdown
from prep.common import ROOT, BadInput, git_state, progress, versions
from train import memory as planner
from train.stage import as_arguments, load_profile

BOOKS = 9_600  # half a megabyte each
STEPS = ["--max_steps=2", "--save_steps=1", "--eval_steps=2", "--logging_steps=1"]
PACKAGES = ("axolotl", "torch", "transformers", "peft", "bitsandbytes")


def commands(profile: str, library: Path | None) -> dict[str, tuple[str, ...]]:
    """{what a row is called: a script or module and its arguments}, in their order."""
    base = ("--tokenizer", "models/base")
    gallica = ("prep/gallica.py", "--source", "data/raw/gallica", *base)
    measured = ("--heldout-windows", "2")  # of 512, a CPU would take an hour
    few = ("--windows", "all", "--holdout", "0.2")
    short, long = (("--windows", "1000000"), ("--windows", "250000")) if library else (few, few)
    recipes = ("--recipes", str(ROOT / "recipes"))
    source = "library" if library else "sources/gallica"
    books = ("bench/prep_speed.py", "--source", str(library), *base, "--books", str(BOOKS), "--library", source)
    found = {
        "collect base": ("prep/collect.py", "base", "--source", "base"),
        "texts": ("demo/corpus.py", "--out", "sources"),
        **({"library": books} if library else {}),
        "collect gallica": ("prep/collect.py", "gallica", "--source", source),
        "collect book": ("prep/collect.py", "book", "--source", "sources/novella.pdf"),
        "prepare 2a": (*gallica, *short, *measured, "--sequence-len", "512", "--split", "1/2", "--out", "data/2a.jsonl"),
        "prepare 2b": (*gallica, *long, *measured, "--sequence-len", "2048", "--split", "2/2", "--out", "data/2b.jsonl"),
        "prepare 2c": ("prep/castle.py", "--book", "data/raw/book/book.pdf", *base, "--holdout", "0.2", "--out", "data/2c.jsonl"),
    }  # fmt: skip
    for name in ("2a", "2b", "2c") if library else ():  # trained bases have this one's tokenizer
        overrides = as_arguments(load_profile(profile, name)[1] | {"base_model": "models/base", "lora_model_dir": None})
        found[f"preprocess {name}"] = ("-m", "axolotl.cli.preprocess", str(ROOT / f"recipes/{name}.yml"), *overrides)
    for name in ("2a", "2b", "2c"):
        train = ("train/stage.py", name, *recipes, "--profile", profile, "--", *STEPS)
        found |= {f"train {name}, to its first checkpoint": train, f"train {name}, resumed": train}
    return found | {
        "evaluate": (
            "eval/evaluation.py", *recipes, "--run", "rehearsal", "--out", "reports", "--limit", "2", "--samples", "1",
            "--max-new-tokens", "32", "--positions", "0",
        ),
        "continue": ("eval/continuation.py", *recipes, "--words", "60", "--chunk-tokens", "64"),
        "export 2c": ("eval/export.py", "2c", *recipes, "--report", "reports/rehearsal.json"),
    }  # fmt: skip


def save_base(tokenizer: Path, folder: Path) -> None:
    """A model of this architecture with random weights in bf16, and a tokenizer of as many tokens."""
    torch.manual_seed(0)
    if not (tokenizer / "tokenizer.json").is_file():
        raise BadInput(f"no tokenizer in {tokenizer}; `make base` collects one, or give --tokenizer FOLDER")
    making = folder.with_name("base-part")
    config = planner.load_config(ROOT / "train/tinyllama.json")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(making)
    for path in tokenizer.glob("*token*"):
        shutil.copyfile(path, making / path.name)
    making.rename(folder)


def used(folder: Path) -> int:
    """Bytes of all files in a folder."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            size += path.lstat().st_size if path.is_file() else 0
    return size


def measure(words: tuple[str, ...], work: Path, log: Path, enough: Callable[[], bool], card: bool) -> dict[str, Any]:
    """Give a command, kill it once `enough` says so; seconds, and bytes: in memory at the peak, of all its processes and of the
    largest, on the card, on the disk."""
    command = [sys.executable, *words] if words[0] == "-m" else [sys.executable, str(ROOT / words[0]), *words[1:]]
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, memory, largest, disk, on_card, killed = used(work), 0, 0, 0, 0, False
    began = time.monotonic()
    with log.open("w") as handle:
        process = psutil.Popen(command, cwd=work, env=environment, stdout=handle, stderr=handle)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # one has just ended
                sizes = [each.memory_info().rss for each in (process, *process.children(recursive=True))]
                memory, largest = max(memory, sum(sizes)), max(largest, *sizes)
            disk = max(disk, used(work) - before)
            on_card = max(on_card, torch.cuda.device_memory_used(0)) if card else 0
            if enough():
                process.kill()
                killed = True
            time.sleep(0.2)
    if process.wait() and not killed:
        raise BadInput(f"{' '.join(words)} failed; its output is in {log}")
    seconds = round(time.monotonic() - began, 1)
    sizes_of = {"memory": memory, "largest": largest, "card": on_card, "disk_peak": disk, "disk": used(work) - before}
    return {"seconds": seconds, **sizes_of}


def page(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    facts = report["facts"]
    names = {
        "memory": "memory, GiB",
        "largest": "of the largest process",
        "card": "card, GiB",
        "disk_peak": "disk while it runs, GiB",
        "disk": "disk after, GiB",
    }
    rows = report["rows"].values()
    names = {key: name for key, name in names.items() if any(row.get(key) for row in rows)}  # no card: no column
    head = ["command", "seconds", *names.values()]
    table = [
        [name, f"{row['seconds']:,.0f}", *(f"{row[key] / planner.GIB:.2f}" if key in row else "–" for key in names)]
        for name, row in report["rows"].items()
    ]
    return (
        f"# A dress rehearsal at true size\n\nTinyLlama's architecture with random weights, {facts['texts']}, "
        f"{facts['steps']} steps a stage, profile `{facts['profile']}`: not a training. "
        f"{made_by(report).removesuffix('.')} (the last command's).\n\n{markdown((head, table))}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="rehearsal", help="section of train/overrides.yml (default: for a CPU)")
    parser.add_argument("--tokenizer", type=Path, default=Path("models/base"), help="folder of one of 32,000 tokens")
    parser.add_argument("--work", type=Path, default=ROOT / "bench/run/rehearsal", help="working folder, 30 GB")
    parser.add_argument("--library", type=Path, help="folder of French novels in parquet: rows as many as the recipes'")
    parser.add_argument("--only", nargs="+", default=[""], help="commands whose name holds one of these, as `train`")
    parser.add_argument("--out", type=Path, help="default: bench/reports/rehearsal.json or rehearsal-gpu.json")
    args = parser.parse_args()
    work, card = args.work.absolute(), args.profile == "gpu"
    out = (args.out or ROOT / f"bench/reports/rehearsal{'-gpu' if card else ''}.json").absolute()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    facts = {
        "machine": machine(card),
        "versions": versions(*PACKAGES),
        "profile": args.profile,
        "steps": 2,
        "texts": f"{BOOKS:,} books made from novels" if args.library else "the demo's texts",
    }
    report = resumed(out, {"facts": facts, "rows": {}}, facts)
    (work / "logs").mkdir(parents=True, exist_ok=True)
    if not (work / "base").exists():
        save_base(args.tokenizer, work / "base")
    every = commands(args.profile, args.library and args.library.absolute())
    chosen = [name for name in every if any(word in name for word in args.only)]
    left = {name: every[name] for name in chosen if name not in report["rows"]}
    if not left:
        print(f"{out} has all of these: move it away to measure them again")
    for name in progress(left, unit="command"):
        first = work / "outputs" / left[name][1] / "checkpoint-1/complete.json"
        enough = first.exists if name.endswith("checkpoint") else lambda: False
        row = measure(left[name], work, work / "logs" / f"{name}.txt", enough, card)
        report |= {"commit": git_state(), "rows": report["rows"] | {name: row}}
        write_report(out, report, page(report))


if __name__ == "__main__":
    run(main)
