"""Measure the recipes on a GPU: speed, memory, and what each lever buys (`make bench-gpu`).

Every run is a training of its own, by the real Axolotl CLI, on TinyLlama's architecture with random weights and rows of
random text: neither changes speed or memory, so nothing is downloaded. The order is that of interest, every result is
written at once, and the same command goes on where it was stopped. A training that fails, for want of memory or
otherwise, is a result. Recipes run twice: with 11 GiB of the card free, as on a 12 GB card (another process holds the
rest), and with all of it.

  python bench/gpu.py                          everything: bench/reports/gpu.json and gpu.md
  python bench/gpu.py --minutes 9              stop in time; the same command goes on
  python bench/gpu.py --list                   what would run, and in which order
  python bench/gpu.py --only '2a, *, whole*'   some of it
  python bench/gpu.py --profile '2a, shipped, whole card, 1'   which kernels take the time
  python bench/gpu.py --tiny --only '*, shipped, 11 GiB, 1'    on a CPU: a test of the bench, no measurement
"""

import argparse
import fnmatch
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import LlamaConfig, PretrainedConfig

from bench import gpu_report
from bench.gpu_device import machine, only
from bench.gpu_inputs import make_inputs
from bench.gpu_runs import (
    Run,
    effective,
    fingerprint,
    flops_per_token,
    launch,
    load_levers,
    planned,
    probed,
    schedule,
)
from prep.common import BadInput, git_state, run
from train.memory import build, load_config
from train.stages import load_chain

ROOT = Path(__file__).parent.parent
PACKAGES = ("axolotl", "torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "torchao")
PROFILED_STEPS = 3


def tiny_config() -> PretrainedConfig:
    """A Llama that a CPU trains in no time; its sizes have no meaning."""
    return LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def matrix_product() -> dict[str, Any]:
    """The achievable peak, timed by a process of its own."""
    said = subprocess.run([sys.executable, ROOT / "bench/gpu_device.py", "peak"], capture_output=True, text=True)
    if said.returncode:
        raise BadInput(f"the matrix product that times the peak failed: {said.stderr.strip().splitlines()[-1:]}")
    return json.loads(said.stdout.splitlines()[-1])


def choose(runs: list[Run], only_: str | None, profile: str | None) -> list[Run]:
    """The runs that a pattern names. Raises BadInput when it names none."""
    pattern = profile or only_
    if pattern is None:
        return runs
    chosen = [run for run in runs if fnmatch.fnmatchcase(run.id, pattern)]
    if not chosen:
        recipes = ", ".join(sorted({run.recipe for run in runs}))
        raise BadInput(f"no run is called {pattern!r}; recipes are {recipes}, and --list prints every run")
    # A profile slows a run down, so that it is no repetition of it.
    return [replace(run, variant=f"{run.variant} (profile)") for run in chosen] if profile else chosen


def measure(
    item: Run, work: Path, base: PretrainedConfig, args: argparse.Namespace, limit: float
) -> tuple[dict[str, Any], bool]:
    """One run, and whether it ended by itself: one that the time budget cut off is no result."""
    config = effective(item, args.tiny)
    settings = probed(config, item.folder, args.seconds, args.warmup, PROFILED_STEPS if args.profile else 0)
    allowed = min(limit, args.limit)
    result: dict[str, Any] = {
        "id": item.id, "recipe": item.recipe, "variant": item.variant, "free_gib": item.free_gib,
        "repetition": item.repetition, "changes": item.changes, "environment": item.environment,
        "fingerprint": fingerprint(config, item, base.to_diff_dict()),
        "flops_per_token": flops_per_token(base, config), "planned": planned(base, config),
    }  # fmt: skip
    try:
        with only(None if args.tiny else item.free_gib) as free:
            result |= {"free_bytes": free, **launch(item, work, settings, args.tiny, allowed)}
    except BadInput as error:
        result |= {"status": "failed", "reason": str(error), "wall_s": 0.0, "driver_peak": None}
    shutil.rmtree(work / "runs" / item.folder / "output", ignore_errors=True)
    return result, not (result["status"] == "timed out" and allowed < args.limit)


def needed(report: dict[str, Any], args: argparse.Namespace) -> float:
    """Seconds to allow for a run before starting it: what half of them took, and a third more."""
    took = [run["wall_s"] for run in report["runs"] if run["status"] == "ok"]
    return 1.3 * statistics.median(took) if took else args.seconds + 60


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="stop before a run that would not end in this time")
    parser.add_argument("--repetitions", type=int, default=3, help="of recipes and reference (default: 3)")
    parser.add_argument("--only", metavar="PATTERN", help="runs whose name matches, with * and ?; see --list")
    parser.add_argument("--again", action="store_true", help="what is in the report already, too")
    parser.add_argument("--list", action="store_true", help="print the names of the runs, and which are done")
    parser.add_argument("--profile", metavar="PATTERN", help=f"profile {PROFILED_STEPS} steps of these runs instead")
    parser.add_argument("--seconds", type=float, default=15, help="how long each run is timed (default: 15)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before that (default: 4)")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a run has failed (default: 300)")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of rows a recipe (default: 2,000,000)")
    parser.add_argument("--base", type=Path, default=ROOT / "train/tinyllama.json", help="config.json of another size")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes", help="folder (default: recipes)")
    parser.add_argument("--reference", type=Path, default=ROOT / "bench/kafka", help="default: bench/kafka")
    parser.add_argument(
        "--levers", type=Path, default=ROOT / "bench/ablations.yml", help="default: bench/ablations.yml"
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with a tiny model: a test of the bench itself")
    parser.add_argument("--work", type=Path, help="folder for weights, rows and logs (default: bench/run/gpu)")
    parser.add_argument(
        "--out", type=Path, help="report (default: bench/reports/gpu.json; with --tiny in the work folder)"
    )
    args = parser.parse_args()
    if args.warmup < 1 or args.seconds <= 0 or args.repetitions < 1:
        raise BadInput("--warmup and --repetitions are 1 at least, --seconds more than 0")
    args.work = (args.work or ROOT / "bench/run" / ("gpu-tiny" if args.tiny else "gpu")).absolute()
    args.out = args.out or (args.work / "report" / "gpu.json" if args.tiny else ROOT / "bench/reports/gpu.json")
    return args


def new_report(args: argparse.Namespace, base: PretrainedConfig) -> dict[str, Any]:
    """A report without runs: what is measured, where, and with what. Raises BadInput where there is no GPU to measure."""
    return {
        "what": gpu_report.NOT_RECIPES if args.tiny else gpu_report.RECIPES,
        "machine": machine(gpu=not args.tiny),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": git_state(),
        "model": {"parameters": build(base, {}).num_parameters(), **json.loads(base.to_json_string())},
        "settings": {"seconds": args.seconds, "warmup": args.warmup},
        "matrix_products": [],
        "runs": [],
    }


def main() -> None:
    args = parse()
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    shipped, reference = load_chain(args.recipes), load_chain(args.reference)
    # Speed and memory of a continued adapter are those of a new one: nothing more to measure of the reference.
    reference = [stage for stage in reference if not stage.adapter_from]
    runs = choose(schedule(shipped, reference, load_levers(args.levers), args.repetitions), args.only, args.profile)
    base = tiny_config() if args.tiny else load_config(args.base)
    report = gpu_report.load(args.out)
    if args.list:
        done = {run["id"]: run["status"] for run in report["runs"]} if report else {}
        for item in runs:
            print(f"{item.id:60} {done.get(item.id, '')}")
        return

    fresh = new_report(args, base)
    if report:
        gpu_report.check_same(args.out, report, fresh)
    report = report or fresh
    model = base.to_diff_dict()
    done = {run["id"]: run["fingerprint"] for run in report["runs"]}
    todo = [
        item for item in runs if args.again or done.get(item.id) != fingerprint(effective(item, args.tiny), item, model)
    ]  # fmt: skip
    if not todo:
        print(f"all {len(runs)} runs are in {args.out}; --again measures them anew")
        return
    make_inputs(args.work, base, shipped, args.tokens)
    report["matrix_products"].append(matrix_product())
    left = len(todo)
    for item in (bar := tqdm(todo, unit="run")):
        remaining = end - time.monotonic()
        if remaining < needed(report, args):
            break
        bar.set_postfix_str(item.id)
        result, whole = measure(item, args.work, base, args, remaining)
        if not whole:
            break
        report["commit"] = fresh["commit"]
        gpu_report.put(report, result)
        gpu_report.save(args.out, report)
        left -= 1
        said = f"{result['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in result else result.get("reason", "")
        tqdm.write(f"{item.id}: {result['status']} {said}")
    print(
        f"{args.out.with_suffix('.md')}: {left} of {len(runs)} runs are left"
        + (", the same command goes on" if left else "")
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends the training too
    run(main)
