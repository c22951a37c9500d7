"""What quantising a base costs, and what a new adapter's start gives back before any training, on held-out text.

    cd demo/run && python ../../bench/adapter_start.py      # make bench-start; after make demo
    cd bench/run/train-start && python ../../adapter_start.py --model outputs/2a-ours-42-...     # after make bench-train-start

Every variant is that 2a, quantised, with an adapter set by train/adapter_start.py or as the variant says; its calibration
rows are the training rows for 2b. Writes bench/reports/adapter_start.json, then the page from it. Finished variants
are kept: run it again to continue.
"""

from prep.command import run

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from bench.common import resumed
from bench.sweep_plugin import Diagonal, Start, Unweighted
from eval import intervals, models, scoring
from eval.tables import changed, markdown, number
from eval.tasks.texts import read_rows
from prep.common import commit, cpu_name, git_state, progress, sha256, versions, write_text
from train.adapter_start import calibration_rows, correct, unquantised

REPORT = Path(__file__).with_name("reports") / "adapter_start.json"
TASKS = ["gallica_heldout", "novel_heldout"]
WINDOW = 2048
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def kept(*modules: str) -> dict[str, Any]:
    """NF4 with some layers in 16 bits."""
    return NF4 | {"llm_int8_skip_modules": ["lm_head", *modules]}


# name: quantisation, and of the adapter: rank, calibration tokens, kind of start; no adapter where there is no rank
VARIANTS: dict[str, dict[str, Any]] = {
    "16 bits": {"base": None},
    "8 bits": {"base": {"load_in_8bit": True}},
    "NF4": {"base": NF4},
    "NF4, v in 16 bits": {"base": kept("v_proj")},
    "NF4, v and down in 16 bits": {"base": kept("v_proj", "down_proj")},
    "NF4, rank 64": {"base": NF4, "rank": 64},
    "NF4, v in 16 bits, rank 64": {"base": kept("v_proj"), "rank": 64},
    "NF4, unweighted": {"base": NF4, "rank": 64, "start": Unweighted},
    "NF4, diagonal": {"base": NF4, "rank": 64, "start": Diagonal},
    "NF4, rank 16": {"base": NF4, "rank": 16},
    "NF4, rank 128": {"base": NF4, "rank": 128},
    "NF4, rank 64, 1k tokens": {"base": NF4, "rank": 64, "tokens": 1024},
    "NF4, rank 64, 16k tokens": {"base": NF4, "rank": 64, "tokens": 16384},
    "NF4, v and down in 16 bits, rank 64": {"base": kept("v_proj", "down_proj"), "rank": 64},
}


def measure(variant: dict[str, Any], folder: Path, texts: Path) -> dict[str, Any]:
    """Scores of one variant, and the line that its start printed."""
    tokenizer = models.load_tokenizer(folder)
    model: Any = models.load_model(folder, tokenizer, "cpu", torch.float32, variant["base"])
    said = None
    if rank := variant.get("rank"):
        set_seed(42)
        linear: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, use_rslora=True, **linear))
        tokens = [tokenizer(row["text"])["input_ids"] for row in read_rows(texts)]
        starts = [(row, at) for row in tokens for at in range(0, len(row) - WINDOW + 1, WINDOW)]
        windows = [{"input_ids": row[at : at + WINDOW]} for row, at in starts]
        limit = variant.get("tokens", 4096)
        rows = [row[:limit] for row in calibration_rows(windows, 42, limit)]
        said = correct(model, unquantised(str(folder)), rows, variant.get("start", Start)().root)
    scores = scoring.score(scoring.TokenScorer(model.eval(), tokenizer, 1, "scoring"), scoring.load_tasks(TASKS), None)
    return {"scores": scores, "said": said}


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    found, rows = report["variants"], []
    for name, result in found.items():
        cells = []
        for task in TASKS:
            exact, score = found["16 bits"]["scores"][task], result["scores"][task]
            less = intervals.difference(exact["documents"], score["documents"])
            cells += [number(score["bits_per_byte"]), changed(less)]
        rows.append([name, *cells])
    head = ["base and start", "Gallica", "against 16 bits", "novel", "against 16 bits"]
    waiting = [name for name in VARIANTS if name not in found]
    missing = f"Not measured yet: {'; '.join(waiting)}. " if waiting else ""
    where = f"{report['cpu']}, {commit(report['git'])}, {', '.join(f'{k} {v}' for k, v in report['versions'].items())}"
    return (
        "# What quantisation costs, and what the adapter's start gives back\n\nHeld-out bits per byte of a 2a, lower is "
        "better, with the paired 95 % interval of the difference, * where it leaves out zero. Nothing is trained. With a rank, the "
        f"adapter starts as the correction of the quantisation error.\n\n{markdown((head, rows))}\n\n"
        f"{missing}{where}. 2a: {report['path']}, {report['model'][:16]}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/2a"), help="a full model (default: outputs/2a)")
    parser.add_argument("--rows", type=Path, default=Path("data/2b.jsonl"), help="training rows (data/2b.jsonl)")
    args = parser.parse_args()
    packages = versions("torch", "transformers", "peft", "bitsandbytes")
    facts = {"model": sha256(args.model / "model.safetensors"), "cpu": cpu_name(), "versions": packages}
    report = resumed(REPORT, {**facts, "variants": {}}, facts) | {"path": str(args.model), "git": git_state()}
    for name in progress([name for name in VARIANTS if name not in report["variants"]], unit="variant"):
        report["variants"][name] = measure(VARIANTS[name], args.model, args.rows)
        write_text(REPORT, json.dumps(report, ensure_ascii=False) + "\n")
        write_text(REPORT.with_suffix(".md"), page(report))


if __name__ == "__main__":
    run(main)
