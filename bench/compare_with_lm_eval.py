"""What evaluation costs: our scoring of all stages in one process, beside lm-eval's own command once per stage.

    cd demo/run && python ../../bench/compare_with_lm_eval.py --recipes ../../recipes --limit 1

Runs where stages are trained (the demo's folder). Writes bench/reports/eval.json and eval.md: seconds from start to exit,
the bits per byte of both (they must agree to 1e-3), tokens/s of scoring and of generation, the share of padding, and, computed
from these, what a full evaluation of TinyLlama takes.
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

from eval.tables import markdown
from prep.common import ROOT, BadInput, atomic_write, digest, run

TASKS = ("gallica_heldout", "novel_heldout", "novel_train", "english", "code")
AGREE = 1e-3  # bits per byte
BATCHES = (1, 4, 16)
NEW_TOKENS = 40
# Tokens of a full evaluation on a GPU, per stage: held-out Gallica (prep/gallica.py's default), 5 % of a novel of 211 k
# tokens, the excerpts, English and code, then chunks by position at 6 tokens each, at most.
SCORED = {
    "gallica_heldout": 262_144,
    "novel_heldout": 10_550,
    "novel_train, english, code": 9_000,
    "positions": 2 * 64 * 256 * 6,
}
SUSTAINED = 10e12  # FLOP/s that the computed figure assumes


def flop_per_token(config: dict[str, Any], window: int) -> float:
    """Of a forward pass over windows of `window` tokens: a third of full fine-tuning."""
    from transformers import AutoConfig

    from bench.gpu import flops_per_token

    return flops_per_token(AutoConfig.for_model(**config), {"sequence_len": window}) / 3


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Scores of every stage in this process, then the padding of batches and the speed of generation by the last stage."""
    import numpy as np
    import torch

    from eval import generation, models, scoring
    from eval.evaluation import environment
    from train.stages import load_chain

    warnings.filterwarnings("ignore")
    rows = models.present(models.candidates(load_chain(args.recipes)), args.stages)
    if all(row.quantization for row in rows):
        raise BadInput("every stage asked for is quantised: add one that is not; the computed cost uses its speed")
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

    def timed(tokens: int, started: float) -> dict[str, Any]:
        seconds = time.perf_counter() - started
        return {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}

    for row, model, tokenizer in models.loaded(rows, "cpu", torch.float32):
        started = time.perf_counter()
        scores = scoring.score(scoring.TokenScorer(model, tokenizer, 1, row.name), tasks, args.limit)
        bits = {name: score["bits_per_byte"] for name, score in scores.items()}
        speed = timed(sum(score["tokens"] for score in scores.values()), started)
        stages[row.name] = {"bits_per_byte": bits, **speed}
        if row is rows[-1]:
            finished = time.time()  # the rest is not scoring
            for size in BATCHES:
                counter = Counting(model, tokenizer, size, "padding")
                scoring.score(counter, tasks, None)
                padding[str(size)] = round(1 - counter.text / counter.through, 4)
            for count in (1, 4):
                started = time.perf_counter()
                decoding = generation.decoding(NEW_TOKENS)
                drawn = generation.continuations(model, tokenizer, "K. ouvrit la porte.", count, 42, decoding)
                writing.append({"together": count, **timed(sum(sample["tokens"] for sample in drawn), started)})
    return {
        "environment": environment("cpu", "float32"),
        "rows": [
            {"name": row.name, "model": str(row.model), "adapter": str(row.adapter) if row.adapter else None,
             "quantization": row.quantization}
            for row in rows
        ],
        "config": json.loads((rows[-1].model / "config.json").read_text(encoding="utf-8")),
        "finished": finished,
        "stages": stages,
        "padding": padding,
        "writing": writing,
    }  # fmt: skip


def quantised(row: dict[str, Any], folder: Path) -> Path:
    """The row's base, saved as its recipe quantises it: lm-eval 0.4's `load_in_4bit` fails with Transformers 5."""
    import torch

    from eval import models

    target = folder / f"quantised-{digest([row['model'], row['quantization']])}"
    if not target.is_dir():
        tokenizer = models.load_tokenizer(Path(row["model"]))
        model = models.load_model(Path(row["model"]), tokenizer, "cpu", torch.float32, row["quantization"])
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def theirs(row: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row by lm-eval's command: seconds from start to exit, and bits per byte. Raises BadInput when it fails."""
    model = quantised(row, folder) if row["quantization"] else Path(row["model"])
    arguments = f"pretrained={model},max_length=2048,add_bos_token=False,dtype=float32"
    arguments += f",peft={row['adapter']}" if row["adapter"] else ""
    out = folder / row["name"]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments]
    command += ["--include_path", str(ROOT / "eval/tasks"), "--tasks", ",".join(args.tasks)]
    command += ["--device", "cpu", "--batch_size", "1", "--output_path", str(out)]
    command += ["--limit", str(args.limit)] if args.limit else []
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.time() - started
    if done.returncode:
        raise BadInput(f"lm_eval failed on {row['name']}: {done.stderr.strip().splitlines()[-1:]}")
    (path,) = out.rglob("results_*.json")
    scores = json.loads(path.read_text(encoding="utf-8"))["results"]
    bits = {task: scores[task]["bits_per_byte,none"] for task in args.tasks}
    return {"seconds": round(seconds, 1), "bits_per_byte": bits}


def computed(result: dict[str, Any]) -> dict[str, Any]:
    """From FLOP alone: one stage of a full evaluation of TinyLlama, at the rate measured here and at SUSTAINED."""
    name = next(row["name"] for row in result["rows"] if not row["quantization"])
    rate = result["stages"][name]["tokens_per_second"] * flop_per_token(result["config"], 2048)
    tokens = sum(SCORED.values())
    needed = tokens * flop_per_token(json.loads((ROOT / "train/tinyllama.json").read_text(encoding="utf-8")), 2048)
    return {
        "measured_on": name,
        "flop_per_second": rate,
        "tinyllama_tokens": tokens,
        "tinyllama_flop": needed,
        "seconds_here": round(needed / rate),
        "seconds_at_sustained": round(needed / SUSTAINED),
    }


def page(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    where, compared, cost = result["environment"], result["compared"], result["computed"]
    documents = f"the first {result['limit']} documents of each task" if result["limit"] else "all documents"
    writing = ", ".join(f"{one['tokens_per_second']:.0f} with {one['together']} together" for one in result["writing"])
    padding = ", ".join(f"{share:.1%} in batches of {size}" for size, share in result["padding"].items())
    rows = []
    for name, stage in result["stages"].items():
        figures = f"{result['lm_eval'][name]['seconds']:.0f}", f"{compared['differences'][name]:.1e}"
        rows.append([f"`{name}`", f"{stage['tokens']:,}", f"{stage['tokens_per_second']:.0f}", *figures])
    head = ["stage", "tokens scored", "tokens/s", "lm-eval's command, s", "largest difference, bits per byte"]
    return f"""# What evaluation costs

{markdown((head, rows))}

On {documents} ({where["cpu"]}, {where["threads"]} threads, float32, quantised bases in NF4): all stages in one process
{compared["seconds_ours"]:.0f} s, lm-eval's command once per stage {compared["seconds_lm_eval"]:.0f} s, loading included. Padding, over all documents: {padding}.
Generation, by the last stage, tokens/s: {writing}.

Computed, not measured: `{cost["measured_on"]}` was scored at {cost["flop_per_second"] / 1e9:.0f} GFLOP/s; a full evaluation of TinyLlama needs
{cost["tinyllama_tokens"]:,} tokens or {cost["tinyllama_flop"] / 1e15:.2f} PFLOP per stage: {cost["seconds_here"] / 60:.0f} minutes here, {cost["seconds_at_sustained"] / 60:.1f} on a card that sustains {SUSTAINED / 1e12:.0f} TFLOP/s.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of the recipes")
    parser.add_argument("--stages", nargs="+", help="only these (default: all that have weights)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, help="only the first N documents of each task")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench/reports/eval.json", help="default bench/reports/eval.json"
    )
    parser.add_argument("--ours", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # the process that is timed
    args = parser.parse_args()
    if args.ours:
        args.ours.write_text(json.dumps(ours(args)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.time()
        if subprocess.run([sys.executable, *sys.argv, "--ours", str(folder / "ours.json")]).returncode:
            raise BadInput("our scoring failed, see above")
        result = json.loads((folder / "ours.json").read_text(encoding="utf-8"))
        seconds = result.pop("finished") - started
        result |= {"format": 1, "limit": args.limit, "tasks": args.tasks}
        result["lm_eval"] = {row["name"]: theirs(row, args, folder) for row in result["rows"]}
    differences = {
        name: max(
            abs(bits - result["stages"][name]["bits_per_byte"][task]) for task, bits in other["bits_per_byte"].items()
        )
        for name, other in result["lm_eval"].items()
    }
    result["compared"] = {
        "seconds_ours": round(seconds, 1),
        "seconds_lm_eval": round(sum(other["seconds"] for other in result["lm_eval"].values()), 1),
        "differences": differences,
    }
    result["computed"] = computed(result)
    for suffix, text in ((".json", json.dumps(result, ensure_ascii=False, indent=1) + "\n"), (".md", page(result))):
        with atomic_write(args.out.with_suffix(suffix)) as file:
            file.write(text)
    print(page(result))
    if max(differences.values()) > AGREE:
        raise BadInput(f"ours and lm-eval's differ by {max(differences.values()):.4f} bits per byte: one is wrong")


if __name__ == "__main__":
    run(main)
