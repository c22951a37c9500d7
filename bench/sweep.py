"""Which settings learn? Trains variants of the recipes on a small budget and scores each on held-out text.

bench/train.yml lists the variants. All get the same base, tokens, order of tokens and evaluation text, and train through
Axolotl's own command line on one thread, so that sums come in the same order on every machine. Each result is written
when it is there; run the command again to continue, or in several terminals to share the runs. A run whose settings, data
or parent changed is trained again.

    CORPUS_DIR=~/corpus python bench/sweep.py --base demo/run/models/base
    python bench/sweep.py --at-most 1                    one run, then stop
    python bench/sweep.py --list                         which runs are finished
    python bench/sweep.py --plan bench/train-long.yml    fewer variants, three times the tokens

Writes bench/reports/train.json (the evidence), train.md and train.svg; another plan's are named after it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml
from filelock import FileLock, Timeout

from bench import sweep_report
from bench.sweep_report import BASE
from eval import intervals, logs, metrics, models, scoring
from eval.evaluation import environment
from eval.tasks.texts import read_rows
from prep.common import ROOT, BadInput, atomic_write, digest, run, sha256
from train.gate import check_steps, checkpoints, movement_of_weights
from train.resume import prepare_output
from train.stage import command, launch_and_wait, load_profile
from train.stages import Stage, load_chain, load_recipe

VERSION = 1  # of the results: raise it when the same settings and data give other figures
TASKS = ("gallica_heldout", "novel_heldout", "novel_train")
DTYPE = "bfloat16"  # of scoring, as of training; on a CPU float32 takes 2.5 times as long
MERGED = Path("outputs/merged")  # what a recipe names as its base to get the parent's adapter merged
PLAN_KEYS = ("profile", "seeds", "threads", "all", "batch_divisor", "largest_batch", "data", "variants")
KEYS = {"name", "recipe", "seeds", "parent", "start", "quantised", "overrides", "against", "curve", "says"}


@dataclass(frozen=True)
class Run:
    """One training, or one quantisation of what was trained: a variant under one seed. Without a parent: the base."""

    id: str  # variant and seed: 2a-ours-42
    key: str  # hash of all that decides its result
    parent: "Run | None" = None
    stage: str = ""  # stem of its recipe: 2b
    config: dict[str, Any] = field(default_factory=dict, hash=False)  # the recipe with all overrides
    quantised: dict[str, Any] | None = field(default=None, hash=False)  # arguments of BitsAndBytesConfig

    @property
    def folder(self) -> str:
        """Name of its folder and of its result."""
        return f"{self.id}-{self.key[:10]}"

    @property
    def line(self) -> list["Run"]:
        """The runs that it builds on, oldest first, then itself; the base is not among them."""
        return [*self.parent.line, self] if self.parent else []


def load_plan(path: Path) -> dict[str, Any]:
    """The plan, its variants as {name: variant}. Raises BadInput naming the variant and what is wrong with it."""
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"{path} cannot be read as YAML: {error}") from error
    missing = [key for key in PLAN_KEYS if not isinstance(plan, dict) or key not in plan]
    if missing:
        raise BadInput(f"{path} has no {', '.join(missing)}")
    known: dict[str, dict[str, Any]] = {}
    for variant in plan["variants"]:
        name, recipe, parent = (variant.get(key) for key in ("name", "recipe", "parent"))
        seeds = set(variant.setdefault("seeds", plan["seeds"]))
        others = {parent, variant.get("start"), *variant.get("against", [])} - {None, *known}
        wrong = {
            "every variant needs a name of its own": name in (None, BASE, *known),
            f"unknown key {', '.join(sorted(set(variant) - KEYS))}": bool(set(variant) - KEYS),
            f"no recipe {recipe}, or batch_divisor does not have its stage": not recipe
            or Path(recipe).stem not in plan["batch_divisor"]
            or not (ROOT / recipe).is_file(),
            f"{', '.join(map(str, others))} must be listed before it": bool(others),
            f"parent {parent} has not all of its seeds": parent in known and not seeds <= set(known[parent]["seeds"]),
            "`quantised` needs a parent": "quantised" in variant and not parent,
        }
        for message in (message for message, found in wrong.items() if found):
            raise BadInput(f"{path}, variant {name}: {message}")
        known[name] = variant
    return plan | {"variants": known}


def divided(config: dict[str, Any], divisor: int, largest: int) -> dict[str, int]:
    """The recipe's tokens per step divided by `divisor`, in micro-batches of at most `largest` tokens.

    Raises BadInput when that is not a whole number of windows.
    """
    windows, rest = divmod(config["micro_batch_size"] * config["gradient_accumulation_steps"], divisor)
    micro = min(windows, max(1, largest // config["sequence_len"]))
    if rest or not micro or windows % micro:
        raise BadInput(
            f"the recipe's batch cannot be divided by {divisor} into whole micro-batches of {largest} tokens"
        )
    return {"micro_batch_size": micro, "gradient_accumulation_steps": windows // micro}


def settings(variant: dict[str, Any], plan: dict[str, Any], seed: int) -> dict[str, Any]:
    """The whole recipe of one run; an override of null removes a key."""
    stage = Path(variant["recipe"]).stem
    config = load_recipe(ROOT / variant["recipe"])
    merged = (
        config
        | load_profile(plan["profile"], stage)[1]
        | divided(config, plan["batch_divisor"][stage], plan["largest_batch"])
        | plan["all"]
        | ({} if variant.get("curve") else {"test_datasets": None, "evals_per_epoch": None})
        | variant.get("overrides", {})
        | {"seed": seed}
    )
    return {key: value for key, value in merged.items() if value is not None}


def runs_of(plan: dict[str, Any], data: dict[str, str], base_sha256: str) -> list[Run]:
    """The base, then all variants under their first seed, then under their second, each after what it builds on.

    `data` is {stage: sha256 of its manifest}.
    """
    base = Run(BASE, digest([VERSION, data, base_sha256]))
    made: dict[tuple[str, int], Run] = {}
    turn: dict[Run, int] = {base: -1}
    for name, variant in plan["variants"].items():
        stage = Path(variant["recipe"]).stem
        for place, seed in enumerate(variant["seeds"]):
            parent = made[variant["parent"], seed] if variant.get("parent") else base
            config = settings(variant, plan, seed)
            # Axolotl's cache of tokenised rows ignores new rows under an old name; this name changes with them.
            config["dataset_prepared_path"] += f"-{data[stage][:12]}"
            key = digest([config, variant.get("quantised"), parent.key])
            this = made[name, seed] = Run(f"{name}-{seed}", key, parent, stage, config, variant.get("quantised"))
            turn[this] = max(place, turn[parent])
    return sorted(turn, key=lambda this: turn[this])


def prepare(plan: dict[str, Any], work: Path) -> dict[str, str]:
    """Make the training rows once, by the plan's commands; {stage: sha256 of its manifest}. Raises BadInput."""
    done = work / "data" / "made.json"
    made_from = digest([plan["data"], sha256(work / "models/base/tokenizer.json")])
    if not done.is_file() or json.loads(done.read_text()) != made_from:
        if "CORPUS_DIR" not in os.environ:
            raise BadInput("set CORPUS_DIR to the folder with gallica/*.parquet and book/book.txt")
        done.parent.mkdir(exist_ok=True)
        corpus = str(Path(os.environ["CORPUS_DIR"]).resolve())
        environment = os.environ | {"CORPUS_DIR": corpus, "PYTHON": sys.executable, "ROOT": str(ROOT)}
        for line in plan["data"]:
            if subprocess.run(["bash", "-euc", line], cwd=work, env=environment).returncode:
                raise BadInput(f"this command failed, see above: {line}")
        store(made_from, done)
    return {stage: sha256(work / f"data/{stage}.manifest.json") for stage in plan["batch_divisor"]}


def lay_out(this: Run, work: Path) -> Path:
    """Make the run's folder: the recipes of its line, and links to models, data and the outputs it builds on."""
    folder = work / this.folder
    for name in ("recipes", "outputs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for each in this.line:
        (folder / "recipes" / f"{each.stage}.yml").write_text(yaml.safe_dump(each.config, sort_keys=False))
    links = {"models": Path("../models"), "data": Path("../data")}
    links |= {f"outputs/{each.stage}": Path("../..") / each.folder / "outputs" / each.stage for each in this.line[:-1]}
    for name, target in links.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    return folder


def launch(arguments: list[str], what: str) -> None:
    """Run a command of Axolotl's, its output into train.log. Raises BadInput when it fails."""
    log = Path("train.log")
    with log.open("a", encoding="utf-8") as handle:
        status = launch_and_wait(arguments, handle)
    if status:
        raise BadInput(f"{what} failed with status {status} (log: {log.absolute()}); run again to resume")


def merge(adapter: Run) -> None:
    """Make outputs/merged, an adapter merged into its base by Axolotl's command. Raises BadInput."""
    making = MERGED.with_name("merging")  # renamed when it is whole
    arguments = [f"--lora_model_dir={adapter.config['output_dir']}", f"--output_dir={making}"]
    merging = [sys.executable, "-m", "axolotl.cli.merge_lora", f"recipes/{adapter.stage}.yml", *arguments]
    launch(merging, f"merging the adapter of {adapter.folder}")
    (making / MERGED.name).rename(MERGED)


def train(this: Run, stage: Stage, plan: dict[str, Any]) -> dict[str, Any]:
    """Train in the working directory, or resume; steps, movement of the weights (median over matrices) and losses."""
    try:
        steps = check_steps(stage)  # the training of a sweep that was killed while scoring is there
    except BadInput:
        if stage.base_model == MERGED and this.parent and not MERGED.is_dir():
            merge(this.parent)
        prepare_output(stage, {"key": this.key})
        threads = ["--num_cpu_threads_per_process", str(plan["threads"])]
        accelerate = [*load_profile(plan["profile"], this.stage)[0], *threads]
        launch(command(stage, accelerate, {}, []), f"training {this.folder}")
        steps = check_steps(stage)
    moved = None
    if stage.adapter is None:
        tensors = movement_of_weights(stage.base_model, stage.output_dir).values()
        matrices = [tensor for tensor in tensors if tensor["kind"] == "matrix"]
        moved = {key: statistics.median(tensor[key] for tensor in matrices) for key in ("changed", "relative")}
    config = stage.config
    return {
        "steps": steps["reached"],
        "tokens_per_step": config["sequence_len"] * config["micro_batch_size"] * config["gradient_accumulation_steps"],
        "moved": moved,
        "log": [
            [point["step"], point["loss"], point["eval_loss"]] for point in logs.training_log(stage.output_dir) or []
        ],
    }


def scored(row: models.Candidate) -> dict[str, Any]:
    """Scores of one row of the working directory: nats of each unit (work or block) of each text, and what these are."""
    warnings.filterwarnings("ignore")
    model: Any  # a PeftModel answers as the model under it does
    for _, model, tokenizer in models.loaded([row], "cpu", getattr(torch, DTYPE)):
        scores = scoring.score(scoring.TokenScorer(model, tokenizer, 1, row.name), scoring.load_tasks(TASKS), None)
    texts, nll = {}, {}
    for task, score in scores.items():
        unit, table = intervals.units(score["documents"])
        texts[task] = {"tokens": score["tokens"], "unit": unit, "bytes": table[:, 1].astype(int).tolist()}
        if unit == "work":
            texts[task]["works"] = sorted({document["source"] for document in score["documents"]})
        nll[task] = table[:, 0].round(4).tolist()
    memorised = metrics.memorisation(scores)
    sides = ("train", "heldout")
    probability = {side: memorised[side]["token_probability"] for side in sides} if memorised else None
    return {"nll": nll, "token_probability": probability, "texts": texts}


def score(row: models.Candidate) -> dict[str, Any]:
    """`scored` in its own process: on a CPU malloc keeps much of what forward passes used, 5 GB after three rows."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(scored, row).result()
        except BrokenProcessPool as error:
            raise BadInput(f"scoring {row.name} was killed (out of memory?); run again to resume") from error


def finish(this: Run, work: Path, plan: dict[str, Any]) -> None:
    """Train and score one run and write its result; its weights stay, for the runs that build on them."""
    with contextlib.chdir(lay_out(this, work)):
        trained: dict[str, Any] = {}
        if this.parent is None:
            row = models.Candidate(BASE, Path("models/base"), None, None, None)
        else:
            stage = next(stage for stage in load_chain(Path("recipes")) if stage.name == this.stage)
            row = models.candidate(stage)
            if this.quantised:
                row = replace(row, quantization=this.quantised)
            else:
                trained = train(this, stage, plan)
        store({**trained, **score(row)}, result_file(this, work))
        if trained:  # checkpoints hold optimiser states too; the final weights are beside them
            for checkpoint in checkpoints(Path(this.config["output_dir"])):
                shutil.rmtree(checkpoint)


def result_file(this: Run, work: Path) -> Path:
    """Where its result is, once it is finished."""
    return work / "results" / f"{this.folder}.json"


def store(value: Any, path: Path) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, allow_nan=False)


def claim(runs: list[Run], work: Path) -> tuple[Run, contextlib.AbstractContextManager[Any]] | None:
    """The first unfinished run whose parent is finished and that no other process has, with the lock that keeps it."""
    for this in runs:
        if result_file(this, work).is_file() or (this.parent and not result_file(this.parent, work).is_file()):
            continue
        with contextlib.suppress(Timeout):
            return this, FileLock(work / "results" / f"{this.folder}.lock").acquire(timeout=0)
    return None


def manifest(path: Path) -> dict[str, Any]:
    """What rows were made from, without the corpus's folder on this machine."""
    found = json.loads(path.read_text())
    found["source"]["path"] = Path(found["source"]["path"]).name
    return found


def assemble(plan: dict[str, Any], runs: list[Run], work: Path) -> dict[str, Any]:
    """The report: plan, data and the results that are there."""
    results = {
        this.id: json.loads(result_file(this, work).read_text()) for this in runs if result_file(this, work).is_file()
    }
    texts: dict[str, Any] = next(({**result["texts"]} for result in results.values()), {})
    for result in results.values():
        del result["texts"]  # the same for all
    manifests = {stage: manifest(work / f"data/{stage}.manifest.json") for stage in plan["batch_divisor"]}
    validation = {}  # by which a validation loss becomes bits per byte
    for stage, found in manifests.items():
        rows = read_rows(work / f"data/{stage}.heldout.jsonl")
        tokens = found["heldout"]["tokens"] + found["heldout"]["tail_tokens"]
        validation[stage] = {"tokens": tokens, "bytes": sum(len(row["text"].encode()) for row in rows)}
    recipes = {variant["recipe"]: {"recipe": variant["recipe"], "curve": True} for variant in plan["variants"].values()}
    return {
        "format": sweep_report.FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment("cpu", DTYPE),
        "base_sha256": sha256(work / "models/base/model.safetensors"),
        "plan": {key: plan[key] for key in PLAN_KEYS if key != "variants"},
        "manifests": manifests,
        "validation": validation,
        "texts": texts,
        "recipes": {path: settings(recipe, plan, plan["seeds"][0]) for path, recipe in recipes.items()},
        "variants": plan["variants"],
        "runs": results,
    }


def write_report(plan: dict[str, Any], runs: list[Run], work: Path, target: Path) -> None:
    """The JSON report, and page and picture beside it."""
    with FileLock(work / "report.lock"):
        with atomic_write(target) as file:
            file.write(sweep_report.dumped(assemble(plan, runs, work)))
        sweep_report.write(target)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=ROOT / "bench/train.yml", help="default: bench/train.yml")
    parser.add_argument("--base", type=Path, default=ROOT / "demo/run/models/base", help="folder of the base model")
    parser.add_argument("--work", type=Path, help="working folder, 0.3 GB per run of 2a (default: bench/run/PLAN)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/reports", help="folder of the report")
    parser.add_argument("--at-most", type=int, metavar="N", help="stop after N runs")
    parser.add_argument("--list", action="store_true", help="print which runs are finished")
    return parser.parse_args()


def main() -> None:
    args = parse()
    target = args.out / f"{args.plan.stem}.json"
    plan = load_plan(args.plan)
    work, base = (args.work or ROOT / "bench/run" / args.plan.stem).resolve(), args.base.resolve()
    if not (base / "model.safetensors").is_file():
        raise BadInput(f"{base} holds no base model; `make demo` collects one in its first step, or give --base FOLDER")
    for name in "models", "results":
        (work / name).mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock"):  # rows are made by one process while others wait
        (work / "models/base").unlink(missing_ok=True)
        (work / "models/base").symlink_to(base)
        data = prepare(plan, work)
    runs = runs_of(plan, data, sha256(base / "model.safetensors"))

    def left() -> list[Run]:
        return [this for this in runs if not result_file(this, work).is_file()]

    if args.list:
        for this in runs:
            print("       -" if this in left() else "finished", this.folder)
        return
    os.environ["OMP_NUM_THREADS"] = str(plan["threads"])  # of the processes that merge and score
    done = 0
    while left() and done != args.at_most:
        claimed = claim(runs, work)
        if not claimed:
            time.sleep(5)  # other processes have all that can be run now
            continue
        this, lock = claimed
        with lock:
            if result_file(this, work).is_file():  # another process finished it a moment ago
                continue
            print(f"{this.folder}: started, {len(left())} of {len(runs)} runs left", flush=True)
            finish(this, work, plan)
        write_report(plan, runs, work, target)
        done += 1
    write_report(plan, runs, work, target)
    print(f"{len(runs) - len(left())} of {len(runs)} runs finished: {target.with_suffix('.md')}")


if __name__ == "__main__":
    run(main)
