"""Measure the recipes on a GPU: speed, memory, and what each ablation changes (`make bench-gpu`).

Each run trains for some seconds through Axolotl's command line, on TinyLlama's architecture with random weights and rows
of random tokens: neither changes speed or memory, so nothing is downloaded. Recipes run with 11 GiB of the card free, as
on a 12 GB card (the allocator gets no more), and with all of it; then each ablation. A run that fails, out of memory or
otherwise, is a result too. Each result is written at once; run the command again to continue.

  python bench/gpu.py                          everything: bench/reports/gpu.json and gpu.md
  python bench/gpu.py --list                   all runs in their order
  python bench/gpu.py --only '2a, *, whole*'   some of them
  python bench/gpu.py --tiny --only '*, ours, 11 GiB, 1'     a tiny model on a CPU: tests this script, measures nothing
"""

from prep.command import run

import argparse
import contextlib
import fnmatch
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from bench.common import resumed, write_report
from eval.tables import markdown
from prep.common import ROOT, BadInput, commit, cpu_name, digest, git_state, lock, progress, versions, write_text
from train import memory as planner
from train.stage import command, launch_and_wait, load_profile
from train.stages import Stage, load_chain

GIB = 2**30
CARD = 11.0  # GiB free on a 12 GB card: 12 less what the driver and a desktop take
WINDOWS_PER_ROW = 16  # as the rows of the recipes have at most
SPECIALS = ["<unk>", "<s>", "</s>"]
PACKAGES = ("axolotl", "torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "torchao")
LIMIT = 800  # seconds after which a run has failed
TINY: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
QUIET: dict[str, Any] = {  # without what only a long training needs
    "test_datasets": None, "eval_steps": None, "save_steps": None, "save_strategy": "no",
    "auto_resume_from_checkpoints": False, "use_tensorboard": False,
}  # fmt: skip


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training."""

    recipe: str
    variant: str  # ours, kafka, or the name of an ablation
    free_gib: float | None  # of the card; None: all of it
    repetition: int
    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)  # an ablation's, also of what --tiny overrides

    @property
    def id(self) -> str:
        card = "whole card" if self.free_gib is None else f"{self.free_gib:g} GiB"
        return f"{self.recipe}, {self.variant}, {card}, {self.repetition}"

    def trained(self, tiny: bool) -> dict[str, Any]:
        """The recipe as it is measured, for a CPU if `tiny`; an override of null removes a key."""
        cpu = load_profile("smoke", self.recipe)[1] | {"max_steps": None} if tiny else {}
        config = self.config | cpu | self.overrides | QUIET
        config["plugins"] = [name for name in config.get("plugins", []) if not name.startswith("train.")]
        return {key: value for key, value in config.items() if value is not None}


def load_ablations(path: Path, ours: list[Stage]) -> list[Run]:
    """The ablations' runs in the file's order."""
    recipes = {stage.name: stage.config for stage in ours}

    def ablation(recipe: str, name: str, overrides: Any = None, environment: Any = None, card: str = "") -> Run:
        free = None if card == "whole" else CARD
        return Run(recipe, name, free, 1, recipes[recipe], environment or {}, overrides or {})

    return [ablation(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def schedule(ours: list[Stage], kafka: list[Stage], ablations: list[Run], repetitions: int) -> list[Run]:
    """Every run, the most interesting first: ours and kafka in turn, within 11 GiB and on the whole card; all of that
    again, in the same order, so that what drifts drifts for both; then the ablations."""
    sides = sorted([*(("ours", s) for s in ours), *(("kafka", s) for s in kafka)], key=lambda side: side[1].name)
    return [
        Run(stage.name, side, free, repetition, stage.config)
        for repetition in range(1, repetitions + 1)
        for free in (CARD, None)
        for side, stage in sides
    ] + ablations


def planned(config: PretrainedConfig, recipe: dict[str, Any]) -> dict[str, float]:
    """What train/memory.py expects of the allocator, in bytes; empty where it has no figures."""
    try:
        plan = planner.plan(config, recipe)
    except BadInput:
        return {}
    loaded = plan.weights + plan.adapter
    step = loaded + plan.optimizer + plan.all_gradients
    return {"loaded": loaded, "at_optimizer_step": step, "peak_allocated": plan.peak}


# --- what they train on -----------------------------------------------------------------------------------------------


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """A tokenizer of whole words (w3 ... w31999), so that a text of n words has n tokens; BOS is added."""
    words = [*SPECIALS, *(f"w{index}" for index in range(len(SPECIALS), vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_rows(path: Path, tokens: int, sequence_len: int, vocabulary: int) -> None:
    """Rows of exactly 16 windows, counting BOS; the EOS that Axolotl adds is a tail of one token, which it drops."""
    generator = random.Random(sequence_len)
    words = [f"w{index}" for index in range(len(SPECIALS), vocabulary)]
    count = max(1, tokens // (WINDOWS_PER_ROW * sequence_len))
    texts = (" ".join(generator.choices(words, k=WINDOWS_PER_ROW * sequence_len - 1)) for _ in range(count))
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def make_inputs(work: Path, config: PretrainedConfig, chain: list[Stage], tokens: int) -> Path:
    """The folder with model, adapter and rows under the paths that recipes read; made once for the same arguments."""
    made_from = digest([config.to_json_string(), tokens, [stage.config for stage in chain]])
    folder, making = work / f"inputs-{made_from[:10]}", work / "inputs-part"
    if folder.is_dir():
        return folder
    for old in work.glob("inputs-*"):  # gigabytes, of other recipes
        shutil.rmtree(old)
    first = making / chain[0].base_model
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(first)
    save_tokenizer(config.vocab_size, first)
    made_by = {stage.output_dir: stage for stage in chain}
    for stage in chain:
        base = making / stage.base_model
        if not base.exists():  # the output of an earlier stage: the same weights serve
            base.parent.mkdir(parents=True, exist_ok=True)
            base.symlink_to(os.path.relpath(first, base.parent), target_is_directory=True)
        if stage.adapter_from:
            planner.with_adapter(model, made_by[stage.adapter_from].config).save_pretrained(making / stage.adapter_from)
        for path in stage.datasets:
            save_rows(making / path, tokens, stage.config["sequence_len"], config.vocab_size)
    making.rename(folder)
    return folder


# --- the card ---------------------------------------------------------------------------------------------------------
# This process must use no memory of the card: nvidia-smi is asked.


def machine(gpu: bool) -> dict[str, Any]:
    """Names and sizes of the machine. Raises BadInput when a GPU is wanted and torch can use none."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": None}
    if not gpu:
        return found
    card = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0]
    query = ["nvidia-smi", f"--id={card}", "--query-gpu=name,memory.total,driver_version,power.limit"]
    try:
        said = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput("found no NVIDIA GPU; `--tiny` tests this script on a CPU, with a tiny model") from error
    if not torch.backends.cuda.is_built():
        raise BadInput(
            f"torch {torch.__version__} is a build without CUDA; `make setup TORCH=cuda` installs one with it"
        )
    name, memory, driver, power = (value.strip() for value in said.split(","))
    return found | {"gpu": name, "memory": memory, "driver": driver, "power_limit": power, "cuda": torch.version.cuda}


# --- a run ------------------------------------------------------------------------------------------------------------


def measure(item: Run, base: PretrainedConfig, inputs: Path, tiny: bool, settings: dict[str, float]) -> dict[str, Any]:
    """The result of one run: its `status` is ok, out of memory, failed or timed out."""
    config = item.trained(tiny)
    expected = planned(base, config)
    folder = inputs.parent / "runs" / re.sub(r"[^\w.]+", "-", item.id)
    record, recipe, log = folder / "record.json", folder / "config.yml", folder / "log.txt"
    config |= {
        "output_dir": str(folder / "output"),
        "plugins": [*config["plugins"], "bench.gpu_plugin.Probe"],
        "probe_record": str(record),
        **{f"probe_{key}": value for key, value in settings.items()},
        "probe_free_gib": item.free_gib,
    }
    write_text(recipe, yaml.safe_dump(config, sort_keys=False))
    record.unlink(missing_ok=True)
    accelerate = load_profile("smoke", item.recipe)[0] if tiny else []
    variables = [f"{name}={value}" for name, value in item.environment.items()]
    arguments = ["env", *variables, *command(Stage(item.recipe, recipe, config, None), accelerate, {}, [])]
    start = time.monotonic()

    def watch() -> None:
        if time.monotonic() - start > LIMIT:
            raise TimeoutError

    try:
        with contextlib.chdir(inputs), log.open("w") as handle:
            status = launch_and_wait(arguments, handle, watch)
        if status or not record.exists():
            result = failure(log.read_text(encoding="utf-8", errors="replace"), status)
        else:
            result = figures(json.loads(record.read_text()))
    except TimeoutError:
        result = {"status": "timed out", "reason": f"after {LIMIT} s"}
    shutil.rmtree(folder / "output", ignore_errors=True)
    return {"planned": expected, "wall_s": round(time.monotonic() - start, 1)} | result


def failure(log: str, returncode: int) -> dict[str, Any]:
    """Why a training failed: the last error in its log."""
    errors = re.findall(r"^(?:\[rank\d\]: ?)?((?:\w+\.)*\w*(?<!CalledProcess)(?:Error|Exception|Exit): .*)$", log, re.M)
    full = re.search(r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory", log)
    reason = errors[-1] if errors else f"status {returncode}, and no error in the log"
    return {"status": "out of memory" if full else "failed", "reason": reason[:300]}


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """Speed over the steps after the warm-up that had as many tokens as most: the last one of an epoch may have fewer."""
    steps = list(zip(record["step_seconds"], record["step_tokens"], strict=True))[record["warmup"] :]
    memory, losses = record["memory"], record["losses"]
    if not all(math.isfinite(loss) and loss > 0 for loss in losses):
        return {"status": "failed", "memory": memory, "reason": f"losses of {losses}: nothing is trained"}
    if not steps:
        reason = f"only {len(record['step_seconds'])} steps, all of them warm-up"
        return {"status": "failed", "memory": memory, "reason": reason}
    full = max(tokens for _, tokens in steps)
    times = [seconds for seconds, tokens in steps if tokens == full]
    speed = {"steps": len(times), "tokens_per_step": full, "step_s": statistics.median(times)}
    result = {"status": "ok", "memory": memory, "losses": losses}
    return result | speed | {"tokens_per_s": full * len(times) / sum(times)}


# --- report -----------------------------------------------------------------------------------------------------------

HEAD = ["recipe", "variant", "card", "runs", "tokens/s", "x ours", "x kafka", "ms per step", "loaded, GiB",
        "optimiser step, GiB", "peak, GiB", "reserved, GiB", "driver, GiB"]  # fmt: skip
Key = tuple[str, ...]  # recipe, variant, part of the card


def made_by(report: dict[str, Any]) -> str:
    """Machine, versions and commit of a report, in words."""
    where = ", ".join(f"{key} {value}" for key, value in report["facts"]["machine"].items() if value)
    used = ", ".join(f"{package} {version}" for package, version in report["facts"]["versions"].items())
    return f"{where}. {used}. {commit(report['commit'])}."


def page(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    found: dict[Key, list[dict[str, Any]]] = {}  # the repetitions of each, in the order of their first run
    for name, result in report["runs"].items():
        found.setdefault(tuple(name.split(", ")[:3]), []).append(result)
    facts = report["facts"]
    lines = [
        "# Speed and memory of the recipes\n" if facts["machine"]["gpu"] else "# A test of bench/gpu.py on a CPU\n",
        f"{facts['what']} {facts['parameters']:,} parameters. {made_by(report)}\n",
        "What the columns mean: [bench/README.md](../README.md).\n",
        markdown((HEAD, [row(key, found) for key in found])),
    ]
    return "\n".join(lines) + "\n"


def speed(runs: list[dict[str, Any]]) -> float | None:
    """Tokens/s, median of the repetitions; None if one failed or none was run."""
    if not runs or any(result["status"] != "ok" for result in runs):
        return None
    return statistics.median(result["tokens_per_s"] for result in runs)


def row(key: Key, found: dict[Key, list[dict[str, Any]]]) -> list[str]:
    """One line of the page's table."""
    runs, (recipe, variant, card) = found[key], key
    rate = speed(runs)
    if rate is None:
        failed = [result for result in runs if result["status"] != "ok"]
        reason = f"**{failed[0]['status']}**: {failed[0]['reason']}".replace("|", "/")
        return [*key, f"{len(runs) - len(failed)} of {len(runs)}", reason, *["–"] * 8]

    def largest(name: str) -> float:
        return max(result["memory"].get(name) or 0 for result in runs)

    def memory(name: str, more: str = "") -> str:
        """The largest over the repetitions, in GiB, and how far off the planner's figure is."""
        measured, expected = largest(name), runs[-1]["planned"].get(name)
        plan = f" (planned {expected / GIB:.2f}, {expected / measured - 1:+.0%})" if measured and expected else ""
        return f"{measured / GIB:.2f}{plan}{more}" if measured else "–"

    rates = sorted(result["tokens_per_s"] for result in runs)
    others = [speed(found.get((recipe, side, card), [])) if side != variant else None for side in ("ours", "kafka")]
    loading, retries, driver = largest("peak_while_loading"), largest("retries"), largest("driver")
    return [
        *key,
        str(len(runs)),
        f"{rate:,.0f}" + (f" ({rates[0]:,.0f} to {rates[-1]:,.0f})" if len(rates) > 1 else ""),
        *(f"{rate / other:.2f}" if other else "–" for other in others),
        f"{statistics.median(result['step_s'] for result in runs) * 1000:,.0f}",
        memory("loaded"),
        memory("at_optimizer_step"),
        memory("peak_allocated", f" (loading {loading / GIB:.2f})" if loading > largest("peak_allocated") else ""),
        memory("peak_reserved", f" ({retries} retries)" if retries else ""),
        f"{driver / GIB:.2f}" if driver else "–",
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each run is timed (default: 15)")
    parser.add_argument("--repetitions", type=int, default=3, help="of ours and kafka (default: 3)")
    parser.add_argument("--only", nargs="+", default=["*"], help="runs whose name matches, with * and ?; see --list")
    parser.add_argument("--list", action="store_true", help="print the names of the runs, and what became of them")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with a tiny model: tests this script")
    parser.add_argument("--work", type=Path, help="folder for weights, rows and logs (default: bench/run/gpu)")
    parser.add_argument("--out", type=Path, help="default: bench/reports/gpu.json; with --tiny in the work folder")
    args = parser.parse_args()
    work = (args.work or ROOT / "bench/run" / ("gpu-tiny" if args.tiny else "gpu")).absolute()
    out = args.out or (work / "report/gpu.json" if args.tiny else ROOT / "bench/reports/gpu.json")
    settings = {"seconds": 0.5, "warmup": 1} if args.tiny else {"seconds": args.seconds, "warmup": 4}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

    ours, kafka = load_chain(ROOT / "recipes", "2"), load_chain(ROOT / "bench/kafka")
    ours = [stage for stage in ours if not stage.config.get("rl")]  # random rows are no pairs
    kafka = [stage for stage in kafka if not stage.adapter_from]  # a continued adapter costs what a new one does
    everything = schedule(ours, kafka, load_ablations(ROOT / "bench/ablations.yml", ours), args.repetitions)
    chosen = [item for item in everything if any(fnmatch.fnmatchcase(item.id, pattern) for pattern in args.only)]
    if not chosen:
        raise BadInput(f"no run matches {' or '.join(args.only)}; --list prints every run")
    if args.list:
        found = resumed(out, {"runs": {}}, {})["runs"]
        for item in chosen:
            print(f"{item.id:60} {found.get(item.id, {}).get('status', '')}")
        return

    base = LlamaConfig(**TINY) if args.tiny else planner.load_config(ROOT / "train/tinyllama.json")
    facts = {
        "what": "A tiny model: no measurement of the recipes." if args.tiny else "A model with random weights.",
        "machine": machine(gpu=not args.tiny),
        "versions": versions(*PACKAGES),
        "model": json.loads(base.to_json_string()),  # before it is built: Transformers adds to it
        "parameters": planner.build(base, {}).num_parameters(),
        "settings": settings,
    }
    report = resumed(out, {"facts": facts, "commit": None, "runs": {}}, facts)
    # What a run's figures depend on: recipe with overrides, environment, model.
    marks = {item.id: digest([item.trained(args.tiny), item.environment, facts["model"]])[:16] for item in chosen}
    todo = [item for item in chosen if report["runs"].get(item.id, {}).get("fingerprint") != marks[item.id]]
    lock(work / "runs")
    inputs = make_inputs(work, base, ours, 100_000 if args.tiny else 2_000_000)
    for item in progress(todo, unit="run"):
        result = measure(item, base, inputs, args.tiny, settings)
        report["commit"] = git_state()
        report["runs"][item.id] = {"fingerprint": marks[item.id], **result}
        write_report(out, report, page(report))
        said = f"{result['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in result else result["reason"]
        tqdm.write(f"{item.id}: {result['status']} {said}")
    print(f"{out.with_suffix('.md')}: all of {len(chosen)} runs are there")


if __name__ == "__main__":
    run(main)
