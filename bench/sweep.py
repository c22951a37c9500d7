"""Which settings learn? Trains variants of the recipes on a small budget and scores each on held-out text.

bench/train.yml lists the variants. All get the same base, tokens, order of tokens and evaluation text, and train through
Axolotl's own command line on one thread, so that sums come in the same order on every machine. Each result is written
when it is there; run the command again to continue, or in several terminals to share the runs. A run whose settings, data
or parent changed is trained again.

    CORPUS_DIR=~/corpus python bench/sweep.py --base demo/run/models/base
    python bench/sweep.py --list                         which runs are finished
    python bench/sweep.py --plan bench/train-long.yml    fewer variants, three times the tokens

Writes bench/reports/train.json (the evidence), train.md and train.svg; another plan's are named after it.
"""

from prep.command import run

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from bench import sweep_report
from bench.common import apart
from bench.sweep_report import BASE
from eval import generation, intervals, logs, metrics, models, scoring
from eval.export import write_model
from eval.reading import TOKENS_A_WORD
from eval.tasks.texts import once, read_rows
from prep.common import ROOT, BadInput, digest, read_yaml, sha256, write_json, write_text
from prep.pairs import places, side
from train.gate import check_steps, checkpoints, movement_of_weights
from train.stage import command, launch_and_wait, load_profile
from train.stages import Stage, load_recipe

VERSION = 1  # of the results: raise it when the same settings and data give other figures
TASKS = ("gallica_heldout", "novel_heldout", "novel_train")  # of a plan without `texts`
MERGED = "outputs/merged"  # what a variant names as its base to get the parent's adapter merged
NEEDED = ("profile", "seeds", "threads", "all", "batch_divisor", "largest_batch", "data")
KEYS = {"name", "recipe", "parent", "start", "quantised", "overrides", "against", "curve", "says"}


@dataclass(frozen=True)
class Run:
    """One training, or one quantisation of what was trained: a variant under one seed. Without a parent: the base.

    Its paths are relative to the work folder, which main() makes the working directory.
    """

    id: str  # variant and seed: 2a-ours-42
    name: str  # of its files and folders: the id and a hash of all that decides its result
    stage: Stage  # the recipe with all overrides and with the folders of this sweep
    parent: "Run | None" = None
    outputs: dict[str, str] = field(default_factory=dict)  # {output folder in the recipes: folder here}
    quantised: dict[str, Any] | None = None  # arguments of BitsAndBytesConfig

    @property
    def result(self) -> Path:
        """Where its scores are, once it is finished."""
        return Path(f"results/{self.name}.json")


def load_plan(path: Path) -> dict[str, Any]:
    """The plan, its variants as {name: variant}. Raises BadInput naming the variant and what is wrong with it."""
    plan = read_yaml(path)
    if missing := [key for key in (*NEEDED, "variants") if not isinstance(plan, dict) or key not in plan]:
        raise BadInput(f"{path} has no {', '.join(missing)}")
    known: dict[str, dict[str, Any]] = {}
    for variant in plan["variants"]:
        others = {variant.get("parent"), variant.get("start"), *variant.get("against", [])}
        faults = {
            "missing keys": {"name", "recipe"} - set(variant),
            "unknown keys": set(variant) - KEYS,
            "variants not listed before it": others - {None, *known},
            "the name of another": {variant.get("name")} & set(known),
        }
        for what, found in faults.items():
            if found:
                raise BadInput(f"{path}, variant {variant.get('name', variant)}: {what}: {', '.join(map(str, found))}")
        known[variant["name"]] = variant
    return plan | {"variants": known}


def divided(config: dict[str, Any], divisor: int, largest: int) -> dict[str, int]:
    """The recipe's tokens per step divided by `divisor`, in micro-batches of at most `largest` tokens. Raises BadInput."""
    windows, rest = divmod(config["micro_batch_size"] * config["gradient_accumulation_steps"], divisor)
    micro = min(windows, largest // config["sequence_len"])
    if rest or not micro or windows % micro:
        raise BadInput(f"the recipe's batch divided by {divisor} is no whole number of windows or of micro-batches")
    return {"micro_batch_size": micro, "gradient_accumulation_steps": windows // micro}


def settings(variant: dict[str, Any], plan: dict[str, Any], seed: int) -> dict[str, Any]:
    """The whole recipe of one run; an override of null removes a key."""
    stage, config = Path(variant["recipe"]).stem, load_recipe(ROOT / variant["recipe"])
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
    decides = [VERSION, dtype(plan), data, base_sha256, *plan.get("texts", ())]
    base = Run(BASE, f"{BASE}-{digest(decides)[:10]}", Stage(BASE, Path(), {}, None))
    runs = [base]
    for seed in plan["seeds"]:
        made: dict[str | None, Run] = {None: base}
        for variant in plan["variants"].values():
            parent, quantised = made[variant.get("parent")], variant.get("quantised")
            recipe, config = Path(variant["recipe"]).stem, settings(variant, plan, seed)
            # Axolotl's cache of tokenised rows ignores new rows under an old name; this name changes with them.
            config["dataset_prepared_path"] += f"-{data[recipe][:12]}"
            run_id = f"{variant['name']}-{seed}"
            name = f"{run_id}-{digest([config, quantised, parent.name])[:10]}"
            outputs = parent.outputs | {f"outputs/{recipe}": f"outputs/{name}", MERGED: f"outputs/{name}-merged"}
            paths = {key: config[key] for key in ("base_model", "lora_model_dir", "output_dir") if key in config}
            config |= {key: outputs.get(path, path) for key, path in paths.items()}
            stage = Stage(name, Path(f"recipes/{name}.yml"), config, None)
            made[variant["name"]] = Run(run_id, name, stage, parent, outputs, quantised)
            runs.append(made[variant["name"]])
    return runs


def prepare(plan: dict[str, Any]) -> dict[str, str]:
    """Make the training rows once, by the plan's commands; {stage: sha256 of its manifest}. Raises BadInput."""
    done = Path("data/made.json")
    made_from = digest([plan["data"], sha256("models/base/tokenizer.json")])
    if not done.is_file() or json.loads(done.read_text()) != made_from:
        if "CORPUS_DIR" in str(plan["data"]) and "CORPUS_DIR" not in os.environ:
            raise BadInput("set CORPUS_DIR to the folder with gallica/*.parquet and book/book.txt")
        done.parent.mkdir(exist_ok=True)
        for line in plan["data"]:
            environment = os.environ | {"PYTHON": sys.executable, "ROOT": str(ROOT)}
            if subprocess.run(["bash", "-euc", line], env=environment).returncode:
                raise BadInput(f"this command failed, see above: {line}")
        write_json(done, made_from)
    return {stage: sha256(f"data/{stage}.manifest.json") for stage in plan["batch_divisor"]}


def train(this: Run, plan: dict[str, Any]) -> dict[str, Any]:
    """Train; steps, movement of the weights (median over matrices) and losses."""
    stage = this.stage
    stage.recipe.write_text(yaml.safe_dump(stage.config, sort_keys=False))
    try:
        steps = check_steps(stage)  # a sweep that was killed while scoring had trained
    except BadInput:
        merged = Path(this.outputs[MERGED])
        if this.parent and stage.base_model == merged and not merged.is_dir():
            apart(save_merged, models.candidate(this.parent.stage), merged)
        shutil.rmtree(stage.output_dir, ignore_errors=True)  # of a killed run
        threads = ["--num_cpu_threads_per_process", str(plan["threads"])]
        arguments = command(stage, [*load_profile(plan["profile"], stage.name)[0], *threads], {}, [])
        output = Path(f"logs/{this.name}.log")
        with output.open("a", encoding="utf-8") as handle:
            if status := launch_and_wait(arguments, handle):
                raise BadInput(
                    f"{this.name} failed with status {status} (log: {output.absolute()}); run again to repeat it"
                ) from None
        steps = check_steps(stage)
    moved = None
    if stage.adapter is None:
        tensors = movement_of_weights(stage.base_model, stage.output_dir).values()
        matrices = [tensor for tensor in tensors if tensor["kind"] == "matrix"]
        moved = {key: statistics.median(tensor[key] for tensor in matrices) for key in ("changed", "relative")}
    config, log = stage.config, logs.training_log(stage.output_dir) or []
    tokens = config["sequence_len"] * config["micro_batch_size"] * config["gradient_accumulation_steps"]
    return {
        "steps": steps["reached"],
        "tokens_per_step": None if config.get("rl") else tokens,  # pairs have as many tokens as their texts
        "moved": moved,
        "log": [[point["step"], point["loss"], point["eval_loss"]] for point in log],
    }


def dtype(plan: dict[str, Any]) -> str:
    """Of scoring, as of training."""
    return "bfloat16" if plan["all"].get("bf16") else "float32"


def score(row: models.Candidate, tasks: Sequence[str], dtype: str, samples: dict[str, int] | None) -> dict[str, Any]:
    """Scores of one row: nats of each unit (work or block) of each text, and what these are; measures of what it writes."""
    warnings.filterwarnings("ignore")
    model: Any  # a PeftModel answers as the model under it does
    texts, nll, written = {}, {}, {}
    for _, model, tokenizer in models.loaded([row], "cpu", getattr(torch, dtype)):
        scores = scoring.score(scoring.TokenScorer(model, tokenizer, 1, row.name), scoring.load_tasks(tasks), None)
        if samples:
            written["samples"], texts["author"] = write(model, tokenizer, **samples)
    for task, score in scores.items():
        unit, table = intervals.units(score["documents"])
        texts[task] = {"tokens": score["tokens"], "unit": unit, "bytes": table[:, 1].astype(int).tolist()}
        if unit == "work":
            texts[task]["works"] = sorted({document["source"] for document in score["documents"]})
        nll[task] = table[:, 0].round(4).tolist()
    memorised = metrics.memorisation(scores)
    sides = ("train", "heldout")
    probability = {side: memorised[side]["token_probability"] for side in sides} if memorised else None
    return {"nll": nll, "token_probability": probability, "texts": texts, **written}


def write(model: Any, tokenizer: Any, prompts: int, draws: int, words: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures, by place, of what a row and what the author wrote after held-out lines of the novel: the mean of each draw's."""
    copies = metrics.CopyFinder(once(Path("data/2c.jsonl")))
    held = [place for row in read_rows(Path("data/2c.heldout.jsonl")) for place in places(row["text"], words, words)]

    def measures(texts: list[str]) -> dict[str, float]:
        found = metrics.degeneration([{"text": text, "ended": False} for text in texts])
        copied = statistics.fmean(copies.longest(text)["words"] for text in texts)
        return {key: found[key] or 0.0 for key in ("looping", "rep_4", "not_french")} | {"copied": copied}

    sides: list[list[dict[str, float]]] = [[], []]
    for number, (prompt, author) in enumerate(held[:: max(1, len(held) // prompts)][:prompts]):
        decoding, ids = generation.decoding(TOKENS_A_WORD * words), generation.encode(tokenizer, prompt)
        drawn = generation.draw(model, tokenizer, ids, draws, number, decoding, open_ended=True)
        sides[0].append(measures([side(sample.text.lstrip().split(" ")[:words]) for sample in drawn]))
        sides[1].append(measures([author]))
    rows, authors = ({key: [round(each[key], 4) for each in found] for key in found[0]} for found in sides)
    return rows, authors


def save_merged(row: models.Candidate, target: Path) -> None:
    """An adapter and its base as one 16-bit model."""
    making = target.with_name(f"{target.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    write_model(row, models.load_tokenizer(row.model), making)
    making.rename(target)


def finish(this: Run, plan: dict[str, Any]) -> None:
    """Train and score one run and write its result; its weights stay, for the runs that build on them."""
    trained: dict[str, Any] = {}
    if this.parent is None:
        row = models.Candidate(BASE, Path("models/base"), None, None, None)
    elif this.quantised:
        row = replace(models.candidate(this.parent.stage), quantization=this.quantised)
    else:
        trained = train(this, plan)
        row = models.candidate(this.stage)
    scores = apart(score, row, tuple(plan.get("texts", TASKS)), dtype(plan), plan.get("samples"))
    write_json(this.result, {**trained, **scores})
    if trained:  # checkpoints hold optimiser states too; the final weights are beside them
        for checkpoint in checkpoints(this.stage.output_dir):
            shutil.rmtree(checkpoint)


def claim(runs: list[Run]) -> tuple[Run, FileLock] | None:
    """The first unfinished run whose parent is finished and that no other process has, with the lock that keeps it."""
    for this in runs:
        if this.parent and not this.parent.result.is_file():
            continue
        lock = FileLock(this.result.with_suffix(".lock"))
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            if not this.result.is_file():
                return this, lock
            lock.release()
    return None


def write_report(plan: dict[str, Any], runs: list[Run], target: Path) -> None:
    """The JSON report (plan, data and the results that are there), and page and picture beside it."""
    results = {this.id: json.loads(this.result.read_text()) for this in runs if this.result.is_file()}
    texts = [result.pop("texts") for result in results.values()]  # the same for all
    manifests, validation = {}, {}
    curved = {Path(variant["recipe"]).stem for variant in plan["variants"].values() if variant.get("curve")}
    for stage in plan["batch_divisor"]:
        found = manifests[stage] = json.loads(Path(f"data/{stage}.manifest.json").read_text())
        found["source"]["path"] = Path(found["source"]["path"]).name  # the corpus's folder is this machine's
        if stage not in curved:
            continue
        rows = read_rows(Path(f"data/{stage}.heldout.jsonl"))
        tokens = found["heldout"]["tokens"] + found["heldout"]["tail_tokens"]
        # By which a validation loss becomes bits per byte.
        validation[stage] = {"tokens": tokens, "bytes": sum(len(row["text"].encode()) for row in rows)}
    recipes = {variant["recipe"]: {"recipe": variant["recipe"], "curve": True} for variant in plan["variants"].values()}
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": models.environment("cpu", dtype(plan)),
        "base_sha256": sha256("models/base/model.safetensors"),
        "plan": {key: value for key, value in plan.items() if key not in ("variants", "shared")},
        "manifests": manifests,
        "validation": validation,
        "texts": texts[0] if texts else {},
        "recipes": {path: settings(recipe, plan, plan["seeds"][0]) for path, recipe in recipes.items()},
        "variants": plan["variants"],
        "runs": results,
    }
    with FileLock("report.lock"):
        write_text(target, sweep_report.dumped(report))
        sweep_report.write(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=ROOT / "bench/train.yml", help="default: bench/train.yml")
    parser.add_argument("--base", type=Path, help="folder of the base model (default: the plan's, or the demo's)")
    parser.add_argument("--work", type=Path, help="working folder, 0.3 GB per run of 2a (default: bench/run/PLAN)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/reports", help="folder of the report")
    parser.add_argument("--list", action="store_true", help="print which runs are finished")
    args = parser.parse_args()
    plan = load_plan(args.plan)
    base = (args.base or ROOT / plan.get("base", "demo/run/models/base")).resolve()
    if not (base / "model.safetensors").is_file():
        raise BadInput(f"{base} holds no base model; `make demo` collects one in its first step, or give --base FOLDER")
    target, work = (args.out / f"{args.plan.stem}.json").resolve(), args.work or ROOT / "bench/run" / args.plan.stem
    if corpus := os.environ.get("CORPUS_DIR"):
        os.environ["CORPUS_DIR"] = str(Path(corpus).resolve())
    os.environ["OMP_NUM_THREADS"] = str(plan["threads"])  # of the processes that merge and score
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    for name in ("models", "recipes", "logs", "results"):
        Path(name).mkdir(exist_ok=True)
    with FileLock("lock"):  # rows are made by one process while others wait
        Path("models/base").unlink(missing_ok=True)
        Path("models/base").symlink_to(base)
        data = prepare(plan)
    runs = runs_of(plan, data, sha256(base / "model.safetensors"))

    def left() -> list[Run]:
        return [this for this in runs if not this.result.is_file()]

    if args.list:
        for this in runs:
            print("finished" if this.result.is_file() else "       -", this.name)
        return
    while left():
        if not (claimed := claim(runs)):
            time.sleep(5)  # other processes have all that can be run now
            continue
        this, lock = claimed
        with lock:
            print(f"{this.name}: started, {len(left())} of {len(runs)} runs left", flush=True)
            finish(this, plan)
        write_report(plan, runs, target)
    write_report(plan, runs, target)
    print(f"{len(runs) - len(left())} of {len(runs)} runs finished: {target.with_suffix('.md')}")


if __name__ == "__main__":
    run(main)
