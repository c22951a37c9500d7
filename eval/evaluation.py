"""Score the base and every stage of a curriculum, let each write, and report.

The chain is read from the recipes; a stage that has no weights yet is left out, and is null in the report.
Every row is scored on the texts of eval/tasks through lm-eval, in windows of 2048 tokens, and continues the prompts of
eval/prompts.yml with one seed and one decoding. Adapters are scored on their base as their recipe quantises it (4-bit NF4),
with which they were trained; full models are scored in the precision of --dtype. Three rows more are scored only: the
model under a new adapter, quantised as the adapter's recipe does; with the adapter as it was before its first step; and
the last adapter merged into one 16-bit model.

Writes <out>/<run>.json (the evidence; eval/report.schema.json describes it), then <run>.md and its plots from it.
A stage whose weights, texts and settings are those of the report already there is not measured again.
Paths are relative to the working directory, as in the recipes.

    python eval/evaluation.py --recipes recipes --run full --out eval/reports
    cd demo/run && python ../../eval/evaluation.py --recipes ../../recipes --run demo --max-new-tokens 80
"""

from prep.command import run

import argparse
import itertools
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval import generation, intervals, logs, metrics, models, questions, reading, report, scoring
from eval.models import environment, files_of
from eval.tasks.texts import once, read_rows
from prep.common import BadInput, changed, digest, hashed, lock, positive, read_json, run_name, write_json
from train.gate import check_window
from train.stages import load_chain

SCORES_VERSION = 2  # raise it when the same weights give other figures: rows of an older version are measured again
TASKS = ("gallica_heldout", "novel_heldout", "novel_train", "english", "code")
POSITIONED = ("gallica_heldout", "novel_heldout")  # the texts long enough to have far context
WORDS_A_TOKEN = 0.5  # of French under these tokenizers: TinyLlama's 0.57, SmolLM2's 0.46


def describe_tasks(tasks: dict[str, Any], limit: int | None) -> dict[str, dict[str, Any]]:
    """What each task scores: the file, if it is one, and the hash of the texts."""
    described = {}
    for name, task in tasks.items():
        texts = [document["text"] for document in task.eval_docs][:limit]
        path = (task.config.dataset_kwargs or {}).get("path")
        described[name] = {
            "path": path,
            "file_sha256": hashed(Path(path)) if path else None,
            "documents": len(texts),
            "text_sha256": digest(texts),
        }
    return described


def gate(row: models.Candidate, hashes: dict[str, str]) -> dict[str, Any] | None:
    """What training said of itself; None when it said nothing.

    `passed` is true when the gate's verdict is there (it is written only then) and is about the weights measured here and
    those below them: a stage below may have been trained again since. Raises BadInput on damaged weights.
    """
    if row.form or row.stage is None or not row.stage.verdict.is_file():
        return None
    folder = row.stage.output_dir

    def pick(verdict: dict[str, Any]) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
        own = {str(folder / file["name"]): file["sha256"] for file in verdict["files"]}
        below = {str(Path(at) / name): sha for at, files in verdict["inputs"].items() for name, sha in files.items()}
        return own, below, {key: verdict[key] for key in ("steps", "data", "versions")}

    own, below, said = read_json(row.stage.verdict, "run the gate again: make check", pick)
    for path, value in own.items():
        if hashes.get(path) != value:
            raise BadInput(f"{path} is not the file that {row.stage.verdict} describes: train {row.name} again")
    recorded = own | below
    passed = all(recorded.get(path) == value for path, value in hashes.items() if path.endswith(".safetensors"))
    return {"passed": passed, **said}


def measure(
    row: models.Candidate,
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    benchmarks: dict[Any, Any],
    prompts: list[dict[str, str]],
    asked: list[dict[str, str]],
    trained_on: metrics.CopyFinder | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that needs the model in memory. Another form of a stage's weights is scored only."""
    times = [time.perf_counter()]
    scorer = scoring.TokenScorer(model, tokenizer, args.batch_size, row.name)
    scores = scoring.score(scorer, tasks, args.limit)
    times.append(time.perf_counter())
    positions: dict[str, Any] = {name: None for name in tasks if name in POSITIONED}
    if args.positions and not row.form:
        for name in positions:
            positions[name] = scoring.by_position(scorer, list(tasks[name].eval_docs)[: args.limit], args.positions)
    times.append(time.perf_counter())
    written = []
    for number, prompt in enumerate([] if row.form else prompts, 1):
        print(f"{row.name}: writing after prompt {number} of {len(prompts)}, {prompt['name']}", file=sys.stderr)
        decoding = generation.decoding(args.max_new_tokens)
        drawn = generation.continuations(model, tokenizer, prompt["text"], args.samples, args.seed, decoding)
        for index, sample in enumerate(drawn):
            copied = trained_on.longest(sample["text"]) if trained_on else None
            written.append({"prompt": prompt["name"], "seed": args.seed, "index": index, **sample, "copied": copied})
    answers = [] if row.form else questions.ask(model, tokenizer, asked, args.max_new_tokens)
    others = {} if row.form else scoring.benchmark(model, tokenizer, benchmarks, args.limit, args.batch_size)
    times.append(time.perf_counter())
    seconds = [round(end - start, 1) for start, end in itertools.pairwise(times)]
    return {
        "scores": scores,
        "positions": positions,
        "memorisation": metrics.memorisation(scores),
        "samples": written,
        **({"answers": answers} if answers else {}),
        **({"benchmarks": others} if others else {}),
        "degeneration": metrics.degeneration(written) if written else None,
        "seconds": dict(zip(("scoring", "positions", "sampling"), seconds, strict=True)),
    }


def reference(path: str | None, trained_on: metrics.CopyFinder | None, max_new_tokens: int) -> dict[str, Any] | None:
    """The author's own held-out pages, in chunks as long as samples, under the measures that samples get.

    None when there are none, or they do not fill one chunk.
    """
    length = max(1, round(max_new_tokens * WORDS_A_TOKEN))
    texts = [chunk for row in rows_of(path) for chunk in metrics.chunks(row["text"], length)]
    if not texts:
        return None
    return {
        "path": path,
        "pieces": len(texts),
        "words": length,
        "degeneration": metrics.degeneration([{"text": text, "ended": False} for text in texts]),
        "copied": [trained_on.longest(text)["words"] for text in texts] if trained_on else [],
    }


def rows_of(path: str | None) -> list[dict[str, str]]:
    """The rows of a task's file; none when the task is not evaluated."""
    return read_rows(Path(path)) if path else []


def styles(stages: dict[str, Any], paths: dict[str, str | None]) -> dict[str, Any] | None:
    """The manner of each stage's samples beside the books'; None when the novel's training text is not among the tasks."""
    if not (novel := paths.get("novel_train")):
        return None
    works: dict[str, list[str]] = {}
    for row in rows_of(paths.get("gallica_heldout")):
        works.setdefault(row["source"], []).append(row["text"])
    return metrics.style(
        {name: [s["text"] for s in stage["samples"]] for name, stage in stages.items() if stage and stage["samples"]},
        "\n\n".join(once(Path(novel))),
        "\n\n".join(row["text"] for row in rows_of(paths.get("novel_heldout"))) or None,
        {source: "\n\n".join(texts) for source, texts in works.items()},
        models.BASE,
    )


def differences(stages: dict[str, Any]) -> dict[str, Any]:
    """Each measured stage against what it builds on, text by text; each adapter also against the full model below it, or
    only against that, where the other is not measured; and against the next stage that was trained on the same rows, as an
    ablation is."""

    measured = {name: stage for name, stage in stages.items() if stage}

    def compared(stage: dict[str, Any], against: str) -> dict[str, Any]:
        before = measured[against]["scores"]
        scores = {
            task: intervals.difference(before[task]["documents"], score["documents"])
            for task, score in stage["scores"].items()
        }
        return {"against": against, "scores": scores}

    result = {}
    full = {stage["model"]: name for name, stage in measured.items() if not (stage["adapter"] or stage["form"])}
    for name, stage in measured.items():
        below = full.get(stage["model"]) if stage["adapter"] else None
        before = stage["parent"] if stage["parent"] in measured or stage["form"] else below
        if before in measured:
            result[name] = compared(stage, before)
        if below and below != before:
            result[f"{name} - {below}"] = compared(stage, below)
    rows = {name: stage["gate"]["data"] for name, stage in measured.items() if stage["gate"]}
    for name, other in itertools.combinations(rows, 2):
        if rows[name] == rows[other]:
            result[f"{name} - {other}"] = compared(measured[name], other)
    return result


def trained_again(weights: dict[str, str]) -> bool:
    """Is one of these files, {path: sha256}, another by now? One that is gone is not."""
    return bool(changed(Path(), {path: sha for path, sha in weights.items() if Path(path).is_file()}))


def previous(path: Path, needed: bool) -> dict[str, Any]:
    """The report that is there, whose rows need not all be measured again; empty when none can be read and none is needed."""
    try:
        return report.load(path) if path.is_file() else {}
    except BadInput as error:
        if needed:
            raise BadInput(f"{error}; --stages would lose its other rows, --fresh gives them up") from error
        print(f"not reused: {error}", file=sys.stderr)
        return {}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--run", type=run_name, required=True, help="name of the report")
    option("--out", type=Path, default=Path("eval/reports"), help="folder of the report")
    option("--stages", nargs="+", help="only these (base, 2a, '2b (start)', '2c (merged)'); default: all")
    option("--tasks", nargs="+", default=TASKS, help="of eval/tasks, of lm-eval's own, or a task's YAML file")
    option("--prompts", type=Path, default=Path(__file__).with_name("prompts.yml"))
    option("--samples", type=positive, default=2, help="continuations of each prompt (default 2)")
    option("--max-new-tokens", type=positive, default=500, help="length of each continuation (default 500)")
    option(
        "--positions",
        type=int,
        metavar="N",
        help="score N chunks of 256 tokens after 0 to 1792 others, 0 for none (default: 64 on a GPU, 0 on a CPU; "
        "each costs 3,840 tokens)",
    )
    option("--limit", type=positive, help="score only the first N documents of each task")
    option("--batch-size", type=positive, help="windows scored at once (default: 4 on a GPU, 1 on a CPU)")
    option("--fresh", action="store_true", help="measure everything again; rows with other settings are left out")
    args = models.parse(parser)
    on_gpu = args.device.startswith("cuda")
    args.batch_size = args.batch_size or (4 if on_gpu else 1)
    if args.positions is None:
        args.positions = 64 if on_gpu else 0
    if args.positions < 0:
        parser.error("--positions must not be below 0")
    return args


def main() -> None:
    args = parse()
    started = time.perf_counter()
    warnings.filterwarnings("ignore")
    target = args.out / f"{args.run}.json"

    rows = models.with_forms(models.candidates(load_chain(args.recipes, args.curriculum)))
    chosen = models.present(rows, args.stages)
    entries = generation.load_prompts(args.prompts)
    asked = [entry for entry in entries if "question" in entry]
    prompts = [entry for entry in entries if "question" not in entry]
    for folder in {row.model for row in chosen if not row.form}:
        tokenizer = models.load_tokenizer(folder)
        check_window(folder, models.MAX_LENGTH)
        if asked:
            questions.need_template(tokenizer, folder)
        for prompt in prompts:
            generation.fitting(tokenizer, prompt["text"], args.max_new_tokens)
    texts = [name for name in args.tasks if (scoring.TASKS / f"{name}.yaml").is_file()]
    benchmarks = scoring.load_benchmarks([name for name in args.tasks if name not in texts])
    tasks = scoring.load_tasks(texts)
    described = describe_tasks(tasks, args.limit)
    paths = {name: description["path"] for name, description in described.items()}
    rows_trained_on = [row["text"] for row in rows_of(paths.get("novel_train"))]
    trained_on = metrics.CopyFinder(rows_trained_on) if rows_trained_on else None
    author = reference(paths.get("novel_heldout"), trained_on, args.max_new_tokens)
    files = {name: hashed(Path(name)) for name in args.tasks if Path(name).is_file()}
    settings = {
        "tasks": list(args.tasks),
        "limit": args.limit,
        "max_length": models.MAX_LENGTH,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
        "seed": args.seed,
        "samples": args.samples,
        "positions": args.positions,
        "decoding": generation.decoding(args.max_new_tokens),
        **({"task_files": files} if files else {}),
    }
    where = environment(args.device, args.dtype)
    hashes = {row.name: {str(path): hashed(path) for path in files_of(row)} for row in chosen}
    gates = {row.name: gate(row, hashes[row.name]) for row in chosen}
    trained = {row.name: row.stage for row in chosen if row.stage and not row.form}
    training = {name: logs.training_log(stage.output_dir) for name, stage in trained.items()}
    same_for_all = [settings, described, prompts, where["versions"], SCORES_VERSION, *asked]
    inputs = {
        row.name: digest([same_for_all, row.form, row.quantization, sorted(hashes[row.name].values())])
        for row in chosen
    }

    lock(target)  # not writable: an error now, not after hours of scoring
    before = previous(target, needed=bool(args.stages) and not args.fresh)
    there = {name: stage for name, stage in before.get("stages", {}).items() if stage}
    others = {name: stage for name, stage in there.items() if name not in inputs} if args.stages else {}
    if stale := [name for name, stage in others.items() if trained_again(stage["weights"])]:
        print(f"left out, trained again since they were measured: {', '.join(stale)}", file=sys.stderr)
        others = {name: stage for name, stage in others.items() if name not in stale}
    now = {"arguments": settings, "tasks": described, "prompts": prompts, "questions": asked}
    if others and (differing := [key for key in now if before.get(key, []) != now[key]]):
        if not args.fresh:
            raise BadInput(
                f"{target} has other {' and '.join(differing)}, and {', '.join(others)} would be lost: choose another --run, "
                "evaluate all stages (without --stages), or leave them out with --fresh"
            )
        print(f"left out, measured with other {' and '.join(differing)}: {', '.join(others)}", file=sys.stderr)
        others = {}
    weights = {name: stage["weights"] for name, stage in others.items()} | hashes
    read = reading.merged(before.get("reading"), weights, target)
    kept = {} if args.fresh else there
    measured = {name: kept[name] for name in inputs if kept.get(name, {}).get("inputs") == inputs[name]}
    if measured:
        print(f"unchanged, not measured again: {', '.join(measured)}", file=sys.stderr)

    def write() -> dict[str, Any]:
        known = {*measured, *others}
        stages: dict[str, Any] = {r.name: others.get(r.name) for r in rows if r.name in known or not r.form}
        for row in chosen:
            if row.name in measured:
                stages[row.name] = {
                    **measured[row.name],
                    "inputs": inputs[row.name],
                    "parent": row.parent,
                    "form": row.form,
                    "recipe": trained[row.name].recipe.name if row.name in trained else None,
                    "model": str(row.model),
                    "adapter": str(row.adapter) if row.adapter else None,
                    "weights": hashes[row.name],
                    "gate": gates[row.name],
                    "training": training.get(row.name),
                }
        result = {
            "format": 1,
            "run": args.run,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),
            "arguments": settings,
            "environment": where,
            "tasks": described,
            "prompts": prompts,
            **({"questions": asked} if asked else {}),
            "reference": author,
            "stages": stages,
            "style": styles(stages, paths),
            "differences": differences(stages),
            **({"reading": read} if read else {}),
        }
        report.check(result, target)
        write_json(target, result)
        return result

    waiting = [row for row in chosen if row.name not in measured]
    for row, model, tokenizer in models.loaded(waiting, args.device, models.DTYPES[args.dtype]):
        measured[row.name] = measure(row, model, tokenizer, tasks, benchmarks, prompts, asked, trained_on, args)
        del model  # before the next is read
        write()  # after each, so that an interrupted run continues where it was
    report.publish(write(), args.out)


if __name__ == "__main__":
    run(main)
