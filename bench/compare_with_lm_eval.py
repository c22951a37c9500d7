"""What evaluation costs: our scoring of all stages against lm-eval's own command once a stage, and writing.

Runs in a working directory whose stages are trained (the demo's), and gives for the first --limit documents of each task:

- seconds of scoring all stages by eval/scoring.py in one process, and of `lm_eval run` once a stage, from start to exit,
  loading included; the bits per byte of both, which must agree to 1e-3;
- tokens a second of scoring, of each stage;
- padding: the share of what goes through the model that is no text, at several batch sizes, over all documents;
- tokens a second of writing by the last stage, one sample at a time and four together;
- what that is in FLOP a second, and from it, computed and not measured, the cost of a full evaluation of TinyLlama.

lm-eval 0.4's `load_in_4bit` does not pass Transformers 5 ("unexpected keyword argument"), so the rounded base that the
adapters stand on is saved once, as such, for its command; that is not counted.

    cd demo/run && python ../../bench/compare_with_lm_eval.py --recipes ../../recipes --limit 1
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything evaluated is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from eval.readme import fill
from prep.common import BadInput, atomic_write, run

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "bench/reports/eval.json"
MARK = "bench-eval"  # of the table in eval/README.md
TASKS = ("gallica_heldout", "novel_heldout", "novel_train", "english", "code")
AGREE = 1e-3  # bits per byte
BATCHES = (1, 4, 16)
NEW_TOKENS = 40
TINYLLAMA = ROOT / "train/tinyllama.json"
# What a full evaluation on a GPU puts through it, a row of the report: held-out Gallica (prep/gallica.py's default), 5 % of
# a novel of 211 k tokens, the excerpts, English and code, then pieces by position at 6 tokens each, at most.
SCORED = {
    "gallica_heldout": 262_144,
    "novel_heldout": 10_550,
    "novel_train, english, code": 9_000,
    "positions": 2 * 64 * 256 * 6,
}
SUSTAINED = 10e12  # FLOP a second that the computed figure stands for


def flop_per_token(config: dict[str, Any], window: int) -> float:
    """Of a forward pass over windows of `window` tokens: a third of what training every weight takes."""
    from transformers import AutoConfig

    from bench.gpu import flops_per_token

    return flops_per_token(AutoConfig.for_model(**config), {"sequence_len": window}) / 3


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Every stage scored in this process, and the last one's writing."""
    import numpy as np
    import torch

    from eval import samples, scoring, weights
    from eval.evaluation import environment
    from train.stages import load_chain

    warnings.filterwarnings("ignore")
    rows = weights.present(weights.candidates(load_chain(args.recipes)), args.stages)
    if all(row.quantization for row in rows):
        raise BadInput(
            "every stage asked for is rounded: name one that is not, too; its speed is what is computed with"
        )
    tasks = scoring.load_tasks(args.tasks)
    stages: dict[str, Any] = {}
    padding: dict[str, float] = {}
    writing: list[dict[str, Any]] = []

    class Counting(scoring.TokenScorer):
        """Counts what would go through the model, and sends nothing."""

        text = through = 0

        def batch_logprobs(self, inputs: list[list[int]], targets: list[list[int]]) -> list[np.ndarray]:
            self.text += sum(map(len, inputs))
            self.through += len(inputs) * max(map(len, inputs))
            return [np.zeros(len(target), dtype=np.float32) for target in targets]

    for row, model, tokenizer in weights.loaded(rows, "cpu", torch.float32):
        started = time.perf_counter()
        scores = scoring.score(scoring.TokenScorer(model, tokenizer, 1, row.name), tasks, args.limit)
        seconds = time.perf_counter() - started
        tokens = sum(score["tokens"] for score in scores.values())
        stages[row.name] = {
            "bits_per_byte": {name: score["bits_per_byte"] for name, score in scores.items()},
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        if row is rows[-1]:
            finished = time.time()
            for size in BATCHES:
                counter = Counting(model, tokenizer, size, "padding")
                scoring.score(counter, tasks, None)
                padding[str(size)] = round(1 - counter.text / counter.through, 4)
            for count in (1, 4):
                started = time.perf_counter()
                drawn = samples.continuations(
                    model, tokenizer, "K. ouvrit la porte.", count, 42, samples.decoding(NEW_TOKENS)
                )
                seconds = time.perf_counter() - started
                tokens = sum(sample["tokens"] for sample in drawn)
                figures = {"seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}
                writing.append({"together": count, "tokens": tokens, **figures})
    return {
        "environment": environment("cpu", "float32"),
        "rows": [
            {"name": row.name, "model": str(row.model), "adapter": str(row.adapter) if row.adapter else None,
             "quantization": row.quantization}
            for row in rows
        ],
        "config": json.loads((rows[-1].model / "config.json").read_text(encoding="utf-8")),
        "finished": finished,  # seconds since the epoch: the rest is not scoring
        "stages": stages,
        "padding": padding,
        "writing": writing,
    }  # fmt: skip


def rounded(row: dict[str, Any], folder: Path) -> Path:
    """The row's base, rounded as its recipe does, saved with what lm-eval reads beside it."""
    import torch

    from eval import weights
    from eval.evaluation import digest

    target = folder / f"rounded-{digest([row['model'], row['quantization']])}"
    if not target.is_dir():
        tokenizer = weights.load_tokenizer(Path(row["model"]))
        model = weights.load_model(Path(row["model"]), tokenizer, "cpu", torch.float32, row["quantization"])
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def command(row: dict[str, Any], model: Path, args: argparse.Namespace, out: Path) -> list[str]:
    """lm-eval's own, for one row."""
    settings = {
        "pretrained": model,
        "peft": row["adapter"],
        "max_length": 2048,
        "add_bos_token": False,
        "dtype": "float32",
    }
    return [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
        *("--model_args", ",".join(f"{key}={value}" for key, value in settings.items() if value is not None)),
        *("--include_path", str(ROOT / "eval/tasks"), "--tasks", ",".join(args.tasks)),
        *("--device", "cpu", "--batch_size", "1", "--output_path", str(out)),
        *(("--limit", str(args.limit)) if args.limit else ()),
    ]


def theirs(rows: list[dict[str, Any]], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each row by lm-eval's command: seconds from start to exit, and bits per byte."""
    results = {}
    for row in rows:
        model = rounded(row, folder) if row["quantization"] else Path(row["model"])
        out = folder / row["name"]
        started = time.time()
        done = subprocess.run(command(row, model, args, out), capture_output=True, text=True)
        seconds = time.time() - started
        if done.returncode:
            raise BadInput(f"lm_eval failed on {row['name']}: {done.stderr.strip().splitlines()[-1:]}")
        (path,) = out.rglob("results_*.json")
        scores = json.loads(path.read_text(encoding="utf-8"))["results"]
        results[row["name"]] = {
            "seconds": round(seconds, 1),
            "bits_per_byte": {task: scores[task]["bits_per_byte,none"] for task in args.tasks},
        }
        print(f"lm_eval: {row['name']} {seconds:.0f} s", file=sys.stderr)
    return results


def computed(result: dict[str, Any]) -> dict[str, Any]:
    """From FLOP alone: a row of TinyLlama's full evaluation, at the rate measured here and at SUSTAINED."""
    name = next(row["name"] for row in result["rows"] if not row["quantization"])
    full = result["stages"][name]
    rate = full["tokens_per_second"] * flop_per_token(result["config"], 2048)
    tokens = sum(SCORED.values())
    needed = tokens * flop_per_token(json.loads(TINYLLAMA.read_text(encoding="utf-8")), 2048)
    return {
        "measured_on": name,
        "flop_per_second": rate,
        "tinyllama_tokens": tokens,
        "tinyllama_flop": needed,
        "seconds_here": round(needed / rate),
        "seconds_at_sustained": round(needed / SUSTAINED),
    }


def table(result: dict[str, Any]) -> str:
    """The report as eval/README.md shows it."""
    where, compared, cost = result["environment"], result["compared"], result["computed"]
    documents = f"the first {result['limit']} documents of each task" if result["limit"] else "all documents"
    writing = ", ".join(f"{one['tokens_per_second']:.0f} with {one['together']} together" for one in result["writing"])
    waste = ", ".join(f"{share:.1%} in batches of {size}" for size, share in result["padding"].items())
    lines = [
        "| stage | tokens scored | tokens a second | lm-eval's command, s | largest difference, bits per byte |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| `{name}` | {stage['tokens']:,} | {stage['tokens_per_second']:.0f} | {result['lm_eval'][name]['seconds']:.0f} "
            f"| {compared['differences'][name]:.1e} |"
            for name, stage in result["stages"].items()
        ),
        "",
        f"On {documents} ({where['cpu']}, {where['threads']} threads, float32, rounded bases in NF4): all stages by one "
        f"process {compared['seconds_ours']:.0f} s, by lm-eval's command once a stage {compared['seconds_lm_eval']:.0f} s, "
        f"loading included. Padding, over all documents: {waste}. Writing, by the last stage, tokens a second: {writing}.",
        "",
        f"Computed, not measured: scoring `{cost['measured_on']}` ran at {cost['flop_per_second'] / 1e9:.0f} GFLOP a second; a row of "
        f"a full evaluation of TinyLlama puts {cost['tinyllama_tokens']:,} tokens through it, {cost['tinyllama_flop'] / 1e15:.2f} "
        f"PFLOP: {cost['seconds_here'] / 60:.0f} minutes here, {cost['seconds_at_sustained'] / 60:.1f} on a card that sustains "
        f"{SUSTAINED / 1e12:.0f} TFLOP a second.",
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of the chain's YAML")
    parser.add_argument("--stages", nargs="+", help="only these; without it, all that have weights")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, help="only the first N documents of each task")
    parser.add_argument("--out", type=Path, default=REPORT, help="the report (default bench/reports/eval.json)")
    parser.add_argument("--readme", type=Path, help="put the table between the marks of this file, too")
    parser.add_argument("--ours", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # the process that is timed
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.ours:
        args.ours.write_text(json.dumps(ours(args)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.time()
        done = subprocess.run([sys.executable, *sys.argv, "--ours", str(folder / "ours.json")])
        if done.returncode:
            raise BadInput("our scoring failed; the reason stands above")
        result = json.loads((folder / "ours.json").read_text(encoding="utf-8"))
        seconds = result.pop("finished") - started
        result |= {
            "format": 1,
            "limit": args.limit,
            "tasks": args.tasks,
            "lm_eval": theirs(result["rows"], args, folder),
        }
    result["compared"] = {
        "seconds_ours": round(seconds, 1),
        "seconds_lm_eval": round(sum(stage["seconds"] for stage in result["lm_eval"].values()), 1),
        "differences": {
            name: max(
                abs(bits - stage["bits_per_byte"][task])
                for task, bits in result["lm_eval"][name]["bits_per_byte"].items()
            )
            for name, stage in result["stages"].items()
        },
    }
    result["computed"] = computed(result)
    with atomic_write(args.out) as file:
        json.dump(result, file, ensure_ascii=False, indent=1)
        file.write("\n")
    if args.readme:
        fill(args.readme, MARK, f"{table(result)}\n")
    print(table(result))
    worst = max(result["compared"]["differences"].values())
    if worst > AGREE:
        raise BadInput(f"ours and lm-eval's differ by {worst:.4f} bits per byte: one of them is wrong")


if __name__ == "__main__":
    run(main)
