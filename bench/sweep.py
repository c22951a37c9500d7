"""Which settings learn? Trains variants of the recipes on one small budget and scores each as the project scores itself.

bench/train.yml says what is compared: for each variant a recipe (ours, or the reference's in bench/reference), what it
changes, the variant it builds on and the seeds. Every variant gets the same base, tokens, order of tokens and evaluation
text, and runs through Axolotl's own command line. Each result is written when it is there, under the hash of its
settings, data, base and parents: killed and started again, the bench goes on; a changed variant is run again, with all
that builds on it, and nothing else. A run has one thread, so that its sums come in the same order on every machine: start
the bench in as many terminals as there are cores, and each takes runs that no other has.

Writes <out>/train.json (the evidence), then train.md and train.svg from it and nothing else; another plan's are named
after it.

    CORPUS_DIR=~/corpus python bench/sweep.py --base demo/run/models/base
    python bench/sweep.py --at-most 1      one variant, then stop: for a machine that others use too
    python bench/sweep.py --list           what is finished, what is not
    python bench/sweep.py --report         page and picture again, from train.json alone
    python bench/sweep.py --plan bench/train-long.yml    fewer variants, three times the tokens
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
from eval import curves, intervals, memory, scoring, weights
from eval.evaluation import digest, environment
from eval.tasks.texts import read_rows
from prep.common import BadInput, atomic_write, run, sha256
from train.gate import NotTrained, check_steps, checkpoints, movement_of_weights
from train.stage import command, launch_and_wait, load_profile, prepare_output
from train.stages import Stage, load_chain, load_recipe

ROOT = Path(__file__).resolve().parent.parent
PLAN = Path(__file__).with_name("train.yml")
TASKS = ("gallica_heldout", "novel_heldout", "novel_train")
DTYPE = "bfloat16"  # of scoring, as of training; in float32 this CPU takes 2.5 times as long
MERGED = Path("outputs/merged")  # of a run whose recipe names it as its base
KEYS = {"name", "recipe", "seeds", "parent", "start", "rounded", "overrides", "against", "curve", "says"}


@dataclass(frozen=True)
class Run:
    """One training, or one rounding of what was trained: a variant under one seed."""

    name: str  # of the variant
    seed: int
    stage: str  # stem of its recipe: 2b
    config: dict[str, Any] = field(hash=False)  # the recipe with everything that is overridden
    parent: "Run | None"
    key: str  # hash of what decides its result
    # Nothing is trained, the parent is scored as these arguments of BitsAndBytesConfig round it.
    rounded: dict[str, Any] | None = field(hash=False, default=None)

    @property
    def folder(self) -> str:
        """Name of its folder and of its result."""
        return f"{self.name}-{self.seed}-{self.key[:10]}"

    @property
    def line(self) -> list["Run"]:
        """Itself after all that it builds on, oldest first."""
        return [*(self.parent.line if self.parent else []), self]


def load_plan(path: Path) -> dict[str, Any]:
    """The variants file, checked. Raises BadInput naming the variant and what is wrong with it."""
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"{path} cannot be read as YAML: {error}") from error
    needed = ("profile", "threads", "all", "batch_divisor", "largest_batch", "data", "variants")
    missing = [key for key in needed if not isinstance(plan, dict) or key not in plan]
    if missing:
        raise BadInput(f"{path} has no {', '.join(missing)}")
    known: dict[str, dict[str, Any]] = {}
    for variant in plan["variants"]:
        name = variant.get("name") if isinstance(variant, dict) else None
        where = f"{path}, variant {name}"
        if not name or not variant.get("recipe") or not variant.get("seeds"):
            raise BadInput(f"{where}: every variant has a name, a recipe and seeds")
        if name in known or name == weights.BASE:
            raise BadInput(f"{where}: there is another of this name")
        if set(variant) - KEYS:
            raise BadInput(f"{where}: unknown {', '.join(sorted(set(variant) - KEYS))}")
        if not (ROOT / variant["recipe"]).is_file():
            raise BadInput(f"{where}: no recipe {variant['recipe']}")
        if Path(variant["recipe"]).stem not in plan["batch_divisor"]:
            raise BadInput(f"{where}: batch_divisor says nothing of stage {Path(variant['recipe']).stem}")
        parent = known.get(variant.get("parent"))
        if variant.get("parent") and not parent:
            raise BadInput(f"{where}: its parent {variant['parent']} does not stand before it")
        if parent and set(variant["seeds"]) - set(parent["seeds"]):
            raise BadInput(f"{where}: its parent was not trained with all of the seeds {variant['seeds']}")
        others = [*variant.get("against", []), *filter(None, [variant.get("start")])]
        unknown = set(others) - set(known) - {weights.BASE}
        if unknown:
            raise BadInput(f"{where}: start or against {', '.join(sorted(unknown))}, which does not stand before it")
        if variant.get("rounded") and (not parent or Path(parent["recipe"]).stem != Path(variant["recipe"]).stem):
            raise BadInput(f"{where}: what is rounded is its parent, of the same recipe")
        known[name] = variant
    return plan


def divided(config: dict[str, Any], divisor: int, largest: int) -> dict[str, int]:
    """The recipe's tokens a step divided by `divisor`, in micro-batches of at most `largest` tokens.

    Raises BadInput when that is no whole number of windows.
    """
    windows = config["micro_batch_size"] * config["gradient_accumulation_steps"]
    micro = max(1, largest // config["sequence_len"])
    if windows % divisor or (windows // divisor > micro and windows // divisor % micro):
        raise BadInput(f"{windows} windows a step cannot be divided by {divisor} into micro-batches of {micro}")
    micro = min(micro, windows // divisor)
    return {"micro_batch_size": micro, "gradient_accumulation_steps": windows // divisor // micro}


def settings(variant: dict[str, Any], seed: int, plan: dict[str, Any]) -> dict[str, Any]:
    """The whole recipe of one run: the file, then the machine's profile, the bench's, the batch, the variant's, the seed.

    An override of null takes a key away.
    """
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


def runs_of(plan: dict[str, Any], data: dict[str, str], base: str) -> list[Run]:
    """Every run: all variants under their first seed, then under their second, each after what it builds on.

    `data` and `base` are hashes, {stage: sha256} and sha256.
    """
    made: dict[tuple[str, int], Run] = {}
    turn: dict[Run, int] = {}
    for variant in plan["variants"]:
        stage = Path(variant["recipe"]).stem
        for place, seed in enumerate(variant["seeds"]):
            parent = made[variant["parent"], seed] if variant.get("parent") else None
            config = settings(variant, seed, plan)
            # Axolotl's cache of tokenised rows does not notice new rows under an old name; this name does.
            config["dataset_prepared_path"] += f"-{data[stage][:12]}"
            rounded = variant.get("rounded")
            key = digest([config, data, base, parent.key if parent else None, *filter(None, [rounded])])
            this = made[variant["name"], seed] = Run(variant["name"], seed, stage, config, parent, key, rounded)
            turn[this] = max(place, turn[parent] if parent else 0)
    return sorted(made.values(), key=lambda this: turn[this])


def prepare(plan: dict[str, Any], work: Path) -> dict[str, str]:
    """Make the training rows once, by the plan's commands; sha256 of each stage's manifest. Raises BadInput."""
    stages = list(plan["batch_divisor"])
    done = work / "data" / "made.json"
    made_from = digest([plan["data"], sha256(work / "models/base/tokenizer.json")])
    if not done.is_file() or json.loads(done.read_text()) != made_from:
        if "CORPUS_DIR" not in os.environ:
            raise BadInput("say where the corpus is: CORPUS_DIR=folder, with gallica/*.parquet and book/book.txt")
        corpus = str(Path(os.environ["CORPUS_DIR"]).resolve())
        surroundings = os.environ | {"CORPUS_DIR": corpus, "PYTHON": sys.executable, "ROOT": str(ROOT)}
        for line in plan["data"]:
            print(line, flush=True)
            if subprocess.run(["bash", "-euc", line], cwd=work, env=surroundings).returncode:
                raise BadInput(f"this failed, see above: {line}")
        with atomic_write(done) as file:
            json.dump(made_from, file)
    return {stage: sha256(work / f"data/{stage}.manifest.json") for stage in stages}


def lay_out(this: Run, work: Path) -> Path:
    """The run's folder: the recipes of its line, the shared models and data, and the outputs of its parents."""
    folder = work / this.folder
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "outputs").mkdir(exist_ok=True)
    for each in this.line:
        (folder / "recipes" / f"{each.stage}.yml").write_text(yaml.safe_dump(each.config, sort_keys=False))
    links = {"models": Path("../models"), "data": Path("../data")}
    links |= {f"outputs/{each.stage}": Path("../..") / each.folder / "outputs" / each.stage for each in this.line[:-1]}
    for name, target in links.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    return folder


def merge(adapter: Run | None) -> None:
    """Make `outputs/merged`: the parent's adapter in its base's weights, as a user would. Raises BadInput."""
    if MERGED.is_dir():
        return
    if not adapter or not adapter.config.get("adapter"):
        raise BadInput(f"{MERGED} is asked for, and there is no adapter to merge: the variant needs a parent with one")
    making = MERGED.with_name("merging")  # beside it, so that a torn one is never taken for it
    recipe = f"recipes/{adapter.stage}.yml"
    arguments = [f"--lora_model_dir={adapter.config['output_dir']}", f"--output_dir={making}"]
    status = launch_and_wait([sys.executable, "-m", "axolotl.cli.merge_lora", recipe, *arguments])
    if status:
        raise BadInput(f"merging the adapter of {adapter.folder} failed with status {status}, see above")
    (making / MERGED.name).rename(MERGED)


def train(this: Run, stage: Stage, launch: list[str]) -> dict[str, Any]:
    """Train in the working directory, or go on from a checkpoint; what the training says of itself. Raises BadInput."""
    try:
        steps = check_steps(stage)  # a bench that was killed while it scored has its training behind it
    except NotTrained:
        if stage.base_model == MERGED:
            merge(this.parent)
        prepare_output(stage, {"key": this.key})
        status = launch_and_wait(command(stage, launch, {}, []))
        if status:
            raise BadInput(f"the training of {this.folder} failed with status {status}, see above") from None
        steps = check_steps(stage)
    moved = None
    if stage.adapter is None:
        tensors = movement_of_weights(stage.base_model, stage.output_dir).values()
        matrices = [tensor for tensor in tensors if tensor["kind"] == "matrix"]
        moved = {key: statistics.median(tensor[key] for tensor in matrices) for key in ("changed", "relative")}
    return {
        "steps": steps,
        "tokens_a_step": stage.config["sequence_len"]
        * stage.config["micro_batch_size"]
        * stage.config["gradient_accumulation_steps"],
        "movement": moved,  # median over the matrices
        "log": curves.training_log(stage.output_dir),
    }


def scored(row: weights.Candidate) -> dict[str, Any]:
    """Score one row of the working directory."""
    warnings.filterwarnings("ignore")
    model: Any  # a PeftModel answers as the model under it does
    for _, model, tokenizer in weights.loaded([row], "cpu", getattr(torch, DTYPE)):
        scores = scoring.score(scoring.TokenScorer(model, tokenizer, 1, row.name), scoring.load_tasks(TASKS), None)
    memorised = memory.memorisation(scores)
    for result in scores.values():
        result["interval"] = intervals.interval(result["documents"])
        for document in result["documents"]:
            del document["spans"]  # summed up in `memorised`
    return {"scores": scores, "memorisation": memorised}


def score(row: weights.Candidate) -> dict[str, Any]:
    """`scored` in a process of its own: malloc keeps much of what a forward pass takes on a CPU, 5 GB after three rows.

    Raises BadInput, also when that process is killed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(scored, row).result()
        except BrokenProcessPool as error:
            raise BadInput(
                f"scoring {row.name} was killed, perhaps for want of memory; the same command goes on"
            ) from error


def manifest(stage: str) -> dict[str, Any]:
    """What a stage's rows were made from, without the folder where the corpus lay on this machine."""
    found = json.loads(Path(f"data/{stage}.manifest.json").read_text())
    found["source"]["path"] = Path(found["source"]["path"]).name
    return found


def validation_text(stage: str) -> dict[str, int]:
    """Tokens and UTF-8 bytes of a stage's held-out rows, by which its validation loss becomes bits per byte."""
    heldout = manifest(stage)["heldout"]
    size = sum(len(row["text"].encode()) for row in read_rows(Path(f"data/{stage}.heldout.jsonl")))
    return {"tokens": heldout["tokens"] + heldout["tail_tokens"], "bytes": size}


def finish(this: Run, work: Path, launch: list[str]) -> None:
    """Train and score one run, write its result, and leave its weights, on which another may build."""
    with contextlib.chdir(lay_out(this, work)):
        stage = next(stage for stage in load_chain(Path("recipes")) if stage.name == this.stage)
        row = weights.candidate(stage)
        if this.rounded:
            trained = dict.fromkeys(("steps", "tokens_a_step", "movement", "log"))
            row = replace(row, quantization=this.rounded)
        else:
            trained = train(this, stage, launch)
        store({"key": this.key, **trained, **score(row)}, result_file(work, this.folder))
        # Checkpoints hold the optimiser's state too; the final weights stand beside them.
        for checkpoint in checkpoints(Path(this.config["output_dir"])):
            shutil.rmtree(checkpoint)


def result_file(work: Path, name: str) -> Path:
    return work / "results" / f"{name}.json"


def claim(
    left: list[Run], results: dict[str, Any], work: Path
) -> tuple[Run, contextlib.AbstractContextManager[Any]] | None:
    """The first of the runs whose parent is finished and that no other process has, and the lock that keeps it so."""
    for this in left:
        if this.parent and not results[this.parent.folder]:
            continue
        try:
            return this, FileLock(work / "results" / f"{this.folder}.lock").acquire(timeout=0)
        except Timeout:
            continue
    return None


def store(result: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as file:
        json.dump(result, file, ensure_ascii=False, indent=1, allow_nan=False)
        file.write("\n")


def recall(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def together(results: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """The documents of one text, each log-likelihood the mean of several seeds'."""
    documents = []
    for same in zip(*(result["scores"][task]["documents"] for result in results), strict=True):
        blocks = [
            {"nll": statistics.fmean(block["nll"] for block in blocks), "bytes": blocks[0]["bytes"]}
            for blocks in zip(*(document["blocks"] for document in same), strict=True)
        ]
        nll = statistics.fmean(document["nll"] for document in same)
        documents.append({"source": same[0]["source"], "bytes": same[0]["bytes"], "nll": nll, "blocks": blocks})
    return documents


def comparison(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], task: str) -> dict[str, Any] | None:
    """Bits per byte of `after` less `before`, both {seed: result}: by seed, and of the means over the seeds of both."""
    seeds = [seed for seed in after if seed in before]
    if not seeds:
        return None
    by_seed = {
        seed: intervals.difference(*(side[seed]["scores"][task]["documents"] for side in (before, after)))
        for seed in seeds
    }
    mean = intervals.difference(*(together([side[seed] for seed in seeds], task) for side in (before, after)))
    return {"seeds": by_seed, "mean": mean}


def assemble(plan: dict[str, Any], runs: list[Run], found: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The report: every variant with the runs that are finished (null where one is not), and the comparisons.

    `found` is {folder: result}, with the base under its own name.
    """
    base = found.get(weights.BASE)
    variants: dict[str, Any] = {}
    for variant in plan["variants"]:
        of_it = [this for this in runs if this.name == variant["name"]]
        variants[variant["name"]] = {
            **variant,
            "stage": of_it[0].stage,
            "settings": of_it[0].config,
            "runs": {str(this.seed): found.get(this.folder) for this in of_it},
        }

    def finished(name: str | None, seeds: list[str]) -> dict[str, dict[str, Any]]:
        if name in (None, weights.BASE):
            return {seed: base for seed in seeds} if base else {}
        return {seed: result for seed, result in variants[name]["runs"].items() if result}

    for variant in variants.values():
        after = finished(variant["name"], [])
        start = variant.get("start") or variant.get("parent") or weights.BASE
        for key, others in (("gain", [start]), ("against", variant.get("against", []))):
            variant[key] = {
                other: {task: comparison(finished(other, list(after)), after, task) for task in TASKS}
                for other in others
            }
    return {**facts, "base": base, "variants": variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN, help="the variants (default: bench/train.yml)")
    parser.add_argument("--base", type=Path, default=ROOT / "demo/run/models/base", help="folder of the base model")
    parser.add_argument(
        "--work", type=Path, help="where it works; 0.3 GB a run of 2a (default: bench/run/ and the name of the plan)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/reports", help="folder of the report")
    parser.add_argument("--tables-in", type=Path, metavar="FILE", help="put the tables between the marks of this page")
    parser.add_argument(
        "--summary-in", type=Path, metavar="FILE", help="put the summary between the marks of this page"
    )
    parser.add_argument("--at-most", type=int, metavar="N", help="train N variants and stop")
    parser.add_argument("--list", action="store_true", help="print what is finished and what is not, and stop")
    parser.add_argument("--report", action="store_true", help="only write page and pictures again, from train.json")
    args = parser.parse_args()
    target = args.out / f"{args.plan.stem}.json"
    if args.report:
        sweep_report.write(target, args.tables_in, args.summary_in)
        return
    warnings.filterwarnings("ignore")
    plan = load_plan(args.plan)
    work, base = (args.work or ROOT / "bench/run" / args.plan.stem).resolve(), args.base.resolve()
    if not (base / "model.safetensors").is_file():
        raise BadInput(f"{base} holds no base model; `make demo` collects one in its first step, or say --base folder")
    for name in "models", "results":
        (work / name).mkdir(parents=True, exist_ok=True)
    shared = FileLock(work / "lock")  # rows and base are made by one process, the others wait for them
    with shared:
        (work / "models/base").unlink(missing_ok=True)
        (work / "models/base").symlink_to(base)
        data = prepare(plan, work)
    base_hash = sha256(base / "model.safetensors")
    runs = runs_of(plan, data, base_hash)
    base_name = f"{weights.BASE}-{digest([data, base_hash])[:10]}"
    results: dict[str, dict[str, Any] | None] = {}

    def look() -> list[Run]:
        """Take up what is finished, here or by another process; the runs that are not."""
        for name in base_name, *(this.folder for this in runs):
            results[name] = results.get(name) or recall(result_file(work, name))
        return [this for this in runs if not results[this.folder]]

    if args.list:
        look()
        for this in runs:
            print("finished" if results[this.folder] else "       -", this.folder)
        return

    with contextlib.chdir(work):
        facts = {
            "format": 1,
            "plan": {key: plan[key] for key in ("profile", "threads", "all", "batch_divisor", "largest_batch", "data")},
            "base_sha256": base_hash,
            "manifests": {stage: manifest(stage) for stage in data},
            "validation": {stage: validation_text(stage) for stage in data},
            "dtype": DTYPE,
        }

    def report() -> None:
        now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment("cpu", DTYPE)}
        found = {weights.BASE: results[base_name], **results}
        with shared:
            store(assemble(plan, runs, found, facts | now), target)
            sweep_report.write(target, args.tables_in, args.summary_in)

    os.environ["OMP_NUM_THREADS"] = str(plan["threads"])  # of the processes that merge and score
    with shared:
        if not result_file(work, base_name).is_file():
            with contextlib.chdir(lay_out(runs[0], work)):
                result = score(weights.Candidate(weights.BASE, Path("models/base"), None, None, None))
            store(result, result_file(work, base_name))
    left, done = look(), 0
    report()
    while left and done != args.at_most:
        claimed = claim(left, results, work)
        if claimed:
            this, lock = claimed
            with lock:
                # another process may have finished it a moment ago
                if not result_file(work, this.folder).is_file():
                    print(f"=== {this.folder} ({len(left)} unfinished)", flush=True)
                    launch = load_profile(plan["profile"], this.stage)[0]
                    finish(this, work, [*launch, "--num_cpu_threads_per_process", str(plan["threads"])])
                    done += 1
        else:
            time.sleep(5)  # the others train what is left, or what it builds on
        left = look()
        if claimed:
            report()
    print(
        f"{len(runs) - len(left)} of {len(runs)} runs finished, {len(left)} left; report: {target.with_suffix('.md')}"
    )


if __name__ == "__main__":
    run(main)
