"""What evaluation costs: our scoring of all stages in one process, beside lm-eval's own command once per stage.

    cd demo/run && python ../../bench/compare_with_lm_eval.py --recipes ../../recipes      # make bench-eval

Runs where stages are trained (the demo's folder). Writes bench/reports/eval.json and eval.md: seconds from start to exit,
tokens/s, and the bits per byte of both, which must agree to 1e-3.
"""

from prep.command import run

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import apart, write_report
from eval import models, scoring
from eval.tables import markdown
from prep.common import ROOT, BadInput, digest
from train.stages import load_chain

REPORT = ROOT / "bench/reports/eval.json"
TASKS = ["gallica_heldout", "novel_heldout", "novel_train", "english", "code"]
AGREE = 1e-3  # bits per byte


def ours(rows: list[models.Candidate]) -> dict[str, Any]:
    """{stage: bits per byte of each task, tokens, seconds, tokens/s} by eval/scoring.py."""
    tasks, found = scoring.load_tasks(TASKS), {}
    for row, model, tokenizer in models.loaded(rows, "cpu", torch.float32):
        started = time.perf_counter()
        scores = scoring.score(scoring.TokenScorer(model, tokenizer, 1, row.name), tasks, None)
        seconds, tokens = time.perf_counter() - started, sum(score["tokens"] for score in scores.values())
        del model  # before the next is read
        bits = {name: score["bits_per_byte"] for name, score in scores.items()}
        speed = {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}
        found[row.name] = {"bits_per_byte": bits, **speed}
    return found


def quantised(row: models.Candidate, folder: Path) -> Path:
    """The row's base, saved as its recipe quantises it: lm-eval 0.4's `load_in_4bit` fails with Transformers 5."""
    target = folder / f"quantised-{digest([str(row.model), row.quantization])}"
    if not target.is_dir():
        tokenizer = models.load_tokenizer(row.model)
        models.load_model(row.model, tokenizer, "cpu", torch.float32, row.quantization).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def theirs(row: models.Candidate, folder: Path) -> dict[str, Any]:
    """One row by lm-eval's command: seconds from start to exit, and bits per byte. Raises BadInput when it fails."""
    model = quantised(row, folder) if row.quantization else row.model
    arguments = f"pretrained={model},max_length=2048,add_bos_token=False,dtype=float32"
    arguments += f",peft={row.adapter}" if row.adapter else ""
    out = folder / row.name
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments]
    command += ["--include_path", str(ROOT / "eval/tasks"), "--tasks", ",".join(TASKS)]
    command += ["--device", "cpu", "--batch_size", "1", "--output_path", str(out)]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.time() - started
    if done.returncode:
        raise BadInput(f"lm_eval failed on {row.name}: {done.stderr.strip().splitlines()[-1:]}")
    (path,) = out.rglob("results_*.json")
    scores = json.loads(path.read_text(encoding="utf-8"))["results"]
    bits = {task: scores[task]["bits_per_byte,none"] for task in TASKS}
    return {"seconds": round(seconds, 1), "bits_per_byte": bits}


def page(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    where, compared = result["environment"], result["compared"]
    rows = []
    for name, stage in result["stages"].items():
        figures = f"{result['lm_eval'][name]['seconds']:.0f}", f"{compared['differences'][name]:.1e}"
        rows.append([f"`{name}`", f"{stage['tokens']:,}", f"{stage['tokens_per_second']:.0f}", *figures])
    head = ["stage", "tokens scored", "tokens/s", "lm-eval's command, s", "largest difference, bits per byte"]
    return f"""# What evaluation costs

{markdown((head, rows))}

On all documents ({where["cpu"]}, {where["threads"]} threads, float32, quantised bases in NF4): all stages in one process
{compared["seconds_ours"]:.0f} s, lm-eval's command once per stage {compared["seconds_lm_eval"]:.0f} s, loading included.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of the recipes")
    rows = models.present(models.candidates(load_chain(parser.parse_args().recipes, "2")), None)
    started = time.time()
    stages = apart(ours, rows)
    seconds = time.time() - started
    with tempfile.TemporaryDirectory() as folder:
        lm_eval = {row.name: theirs(row, Path(folder)) for row in rows}
    differences = {
        name: max(abs(bits - stages[name]["bits_per_byte"][task]) for task, bits in other["bits_per_byte"].items())
        for name, other in lm_eval.items()
    }
    theirs_took = sum(other["seconds"] for other in lm_eval.values())
    took = {"seconds_ours": round(seconds, 1), "seconds_lm_eval": round(theirs_took, 1)}
    result = {
        "environment": models.environment("cpu", "float32"),
        "stages": stages,
        "lm_eval": lm_eval,
        "compared": took | {"differences": differences},
    }
    write_report(REPORT, result, page(result))
    print(page(result))
    if max(differences.values()) > AGREE:
        raise BadInput(f"ours and lm-eval's differ by {max(differences.values()):.4f} bits per byte: one is wrong")


if __name__ == "__main__":
    run(main)
