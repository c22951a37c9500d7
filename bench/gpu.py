"""Measure the recipes on a GPU: speed, memory, and what each ablation changes (`make bench-gpu`).

Each run trains for some seconds through Axolotl's command line, on TinyLlama's architecture with random weights and rows
of random tokens: neither changes speed or memory, so nothing is downloaded. Recipes run with 11 GiB of the card free, as
on a 12 GB card (another process holds the rest), and with all of it; then each ablation. A run that fails, out of memory or
otherwise, is a result too. Each result is written at once; run the command again to continue.

  python bench/gpu.py                          everything: bench/reports/gpu.json and gpu.md
  python bench/gpu.py --minutes 9              time limit; run again to continue
  python bench/gpu.py --list                   all runs in their order
  python bench/gpu.py --only '2a, *, whole*'   some of them
  python bench/gpu.py --tiny --only '*, ours, 11 GiB, 1'     a tiny model on a CPU: tests this script, measures nothing
"""

import argparse
import contextlib
import fnmatch
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tabulate import tabulate
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from prep.common import ROOT, BadInput, atomic_write, commit, cpu_name, digest, git_state, run, versions
from train import memory as planner
from train.stage import load_profile
from train.stages import Stage, load_chain

GIB = 2**30
CARD = 11.0  # GiB free on a 12 GB card: 12 less what the driver and a desktop take
WINDOWS_PER_ROW = 16  # as the rows of the recipes have at most
SPECIALS = ["<unk>", "<s>", "</s>"]
PACKAGES = ("axolotl", "torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "torchao")


def tiny_config() -> PretrainedConfig:
    """A Llama that a CPU trains in seconds."""
    return LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


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
    changes: dict[str, Any] = field(default_factory=dict)  # an ablation's, also of what --tiny overrides

    @property
    def id(self) -> str:
        card = "whole card" if self.free_gib is None else f"{self.free_gib:g} GiB"
        return f"{self.recipe}, {self.variant}, {card}, {self.repetition}"

    @property
    def folder(self) -> str:
        return "runs/" + re.sub(r"[^\w.]+", "-", self.id)

    def trained(self, tiny: bool) -> dict[str, Any]:
        """The recipe without what only a long training needs (validation, checkpoints, the gate); for a CPU if `tiny`."""
        overrides = load_profile("smoke", self.recipe)[1] | {"max_steps": None} if tiny else {}
        quiet: dict[str, Any] = {
            "test_datasets": None, "eval_steps": None, "save_steps": None, "save_strategy": "no",
            "auto_resume_from_checkpoints": False, "use_tensorboard": False,
        }  # fmt: skip
        config = self.config | overrides | self.changes | quiet
        config["plugins"] = [name for name in config.get("plugins", []) if name != "train.plugins.Gate"]
        return {key: value for key, value in config.items() if value is not None}


def load_ablations(path: Path, ours: list[Stage]) -> list[Run]:
    """The ablations' runs in the file's order. Raises BadInput on one that is not well formed."""
    recipes = {stage.name: stage.config for stage in ours}
    runs = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        known = {"recipe", "name", "changes", "environment", "card"}
        if not {"recipe", "name"} <= set(entry) <= known or not entry.keys() & {"changes", "environment"}:
            raise BadInput(f"{path}: {entry} needs recipe, name, and changes or environment; `card: whole` is optional")
        if entry["recipe"] in recipes:
            free = None if entry.get("card") == "whole" else CARD
            config, changes = recipes[entry["recipe"]], entry.get("changes", {})
            runs.append(Run(entry["recipe"], entry["name"], free, 1, config, entry.get("environment", {}), changes))
    return runs


def schedule(ours: list[Stage], kafka: list[Stage], ablations: list[Run], repetitions: int) -> list[Run]:
    """Every run, the most interesting first: ours and kafka within 11 GiB, both in turn on the whole card; all of that
    again, in the same order, so that what drifts drifts for both; then the ablations."""
    runs: list[Run] = []
    for repetition in range(1, repetitions + 1):
        runs += [Run(stage.name, "ours", CARD, repetition, stage.config) for stage in ours]
        runs += [Run(stage.name, "kafka", CARD, repetition, stage.config) for stage in kafka]
        for stage in ours:
            runs.append(Run(stage.name, "ours", None, repetition, stage.config))
            runs += [Run(k.name, "kafka", None, repetition, k.config) for k in kafka if k.name == stage.name]
    return runs + ablations


def flops_per_token(config: PretrainedConfig, recipe: dict[str, Any]) -> float:
    """Operations per token of training, forward and backward; what checkpointing computes twice counts once.

    A weight of a matrix (head included, embedding not) takes 2 forward and 2 for the gradient of its input; 2 more for its
    own gradient if it is trained (Kaplan et al. 2020: 6 N per token; with a frozen base 4 N + 6 N_adapter). Causal
    attention over windows of s tokens takes 2 s q per layer forward, q being the width of all heads, and twice that
    backward (Chowdhery et al. 2022, PaLM, appendix B, halved because the mask leaves half).
    """
    kinds = {kind.kind: sum(kind.elements) for kind in planner.tensors(planner.build(config, recipe), recipe)}
    matrices = kinds["matrix"] + config.vocab_size * config.hidden_size
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * recipe["sequence_len"] * config.num_attention_heads * head
    return (4 if "adapter" in kinds else 6) * matrices + 6 * kinds.get("adapter", 0) + attention


def planned(config: PretrainedConfig, recipe: dict[str, Any]) -> dict[str, float]:
    """What train/memory.py expects of the allocator, in bytes; empty where it has no figures."""
    try:
        plan = planner.plan(config, recipe)
    except BadInput:
        return {}
    loaded = plan.weights + plan.adapter
    step = loaded + plan.optimizer + plan.all_gradients
    return {"loaded": loaded, "at_optimizer_step": step, "peak_allocated": plan.peak}


def launch(item: Run, work: Path, config: dict[str, Any], tiny: bool, limit: float) -> dict[str, Any]:
    """Train in other processes, watching the card; kill them after `limit` seconds. What became of it: `status` is ok,
    out of memory, failed or timed out."""
    folder = work / item.folder
    with atomic_write(folder / "config.yml") as handle:
        yaml.safe_dump(config, handle, sort_keys=False)
    record = work / config["probe_record"]
    record.unlink(missing_ok=True)
    accelerate = load_profile("smoke", item.recipe)[0] if tiny else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *accelerate]
    command += ["-m", "axolotl.cli.train", f"{item.folder}/config.yml"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    if not tiny:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    before = used = card_used(tiny)
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=work, env=environment | item.environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - start < limit:
                used = max(used, card_used(tiny))
                time.sleep(0.02)
            timed_out = process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome: dict[str, Any] = {"wall_s": round(time.monotonic() - start, 1), "driver_peak": used - before or None}
    if timed_out:
        return outcome | {"status": "timed out", "reason": f"after {limit:.0f} s"}
    if process.returncode or not record.exists():
        log_text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        return outcome | failure(log_text, process.returncode)
    return outcome | figures(json.loads(record.read_text()))


def failure(log: str, returncode: int) -> dict[str, str]:
    """Why a training failed: the last error in its log."""
    errors = re.findall(r"^(?:\[rank\d\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Exit): .*)$", log, re.MULTILINE)
    reasons = [error for error in errors if "CalledProcessError" not in error]  # accelerate's own error comes last
    full = re.search(r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory", log)
    reason = reasons[-1] if reasons else f"status {returncode}, and no error in the log"
    return {"status": "out of memory" if full else "failed", "reason": reason[:300]}


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """Speed over the steps after the warm-up that had as many tokens as most: the last one of an epoch may have fewer."""
    steps = list(zip(record["step_seconds"], record["step_tokens"], strict=True))[record["warmup"] :]
    result: dict[str, Any] = {"status": "ok", "memory": record["memory"], "losses": record["losses"]}
    if not all(math.isfinite(loss) and loss > 0 for loss in record["losses"]):
        return result | {"status": "failed", "reason": f"losses of {record['losses']}: nothing is trained"}
    if not steps:
        return result | {"status": "failed", "reason": f"only {len(record['step_seconds'])} steps, all of them warm-up"}
    full = max(tokens for _, tokens in steps)
    times = [seconds for seconds, tokens in steps if tokens == full]
    speed = {"steps": len(times), "tokens_per_step": full, "step_s": statistics.median(times)}
    return result | speed | {"tokens_per_s": full * len(times) / sum(times)}


# --- what they train on -----------------------------------------------------------------------------------------------


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """A tokenizer of whole words (w3 ... w31999), so that a text of n words has n tokens; BOS is added."""
    words = {word: index for index, word in enumerate(SPECIALS)}
    words |= {f"w{index}": index for index in range(len(SPECIALS), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIALS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_rows(path: Path, tokens: int, sequence_len: int, vocabulary: int) -> None:
    """Rows of exactly 16 windows, counting BOS; the EOS that Axolotl adds is a tail of one token, which it drops."""
    generator = random.Random(sequence_len)
    words = [f"w{index}" for index in range(len(SPECIALS), vocabulary)]
    with atomic_write(path) as handle:
        for _ in range(max(1, tokens // (WINDOWS_PER_ROW * sequence_len))):
            text = " ".join(generator.choices(words, k=WINDOWS_PER_ROW * sequence_len - 1))
            handle.write(json.dumps({"text": text}) + "\n")


def make_inputs(work: Path, config: PretrainedConfig, chain: list[Stage], tokens: int) -> None:
    """Model, adapter and rows under the paths that the recipes of `chain` read; made once for the same arguments."""
    wanted = {"model": config.to_diff_dict(), "tokens": tokens, "recipes": [stage.config for stage in chain]}
    ours, stamp = work / "made-by-bench-gpu", work / "inputs.json"
    if work.exists() and any(work.iterdir()) and not ours.exists():
        raise BadInput(f"{work} holds other things; name an empty or a new folder with --work")
    if stamp.exists() and json.loads(stamp.read_text()) == json.loads(json.dumps(wanted)):
        return
    work.mkdir(parents=True, exist_ok=True)
    ours.touch()
    stamp.unlink(missing_ok=True)
    for folder in ("models", "outputs", "data"):
        shutil.rmtree(work / folder, ignore_errors=True)
    made_by = {stage.output_dir: stage for stage in chain}
    first = (work / chain[0].base_model).absolute()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(first)
    save_tokenizer(config.vocab_size, first)
    for stage in chain:
        base = work / stage.base_model
        if not base.exists():  # the output of an earlier stage: the same weights serve
            base.parent.mkdir(parents=True, exist_ok=True)
            base.symlink_to(first, target_is_directory=True)
        if stage.adapter_from:
            planner.with_adapter(model, made_by[stage.adapter_from].config).save_pretrained(work / stage.adapter_from)
        for path in stage.datasets:
            save_rows(work / path, tokens, stage.config["sequence_len"], config.vocab_size)
    with atomic_write(stamp) as handle:
        json.dump(wanted, handle)


# --- the card ---------------------------------------------------------------------------------------------------------
# This process must use no memory of the card, so NVML is asked, and whatever uses the card is a process of its own.


def card_used(tiny: bool) -> int:
    """Bytes of the card in use by any process, as the driver counts; 0 on a CPU."""
    return 0 if tiny else torch.cuda.device_memory_used(0)


def machine(gpu: bool) -> dict[str, Any]:
    """Names and sizes of the machine. Raises BadInput when a GPU is wanted and torch can use none."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": None}
    if not gpu:
        return found
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    fields = ("name", "memory.total", "driver_version", "power.limit")
    query = ["nvidia-smi", f"--id={card}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput("found no NVIDIA GPU; `--tiny` tests this script on a CPU, with a tiny model") from error
    if not torch.backends.cuda.is_built():
        raise BadInput(
            f"torch {torch.__version__} is a build without CUDA; `make setup TORCH=cuda` installs one with it"
        )
    name, memory, driver, power = (value.strip() for value in said.split(","))
    return found | {"gpu": name, "memory": memory, "driver": driver, "power_limit": power, "cuda": torch.version.cuda}


def measure_peak(seconds: float = 3.0) -> None:
    """Print the median FLOP/s of a large square matrix product (2 n^3 operations), bf16 on a GPU, fp32 on a CPU."""
    gpu = torch.cuda.is_available()
    n, device, dtype = (8192, "cuda", torch.bfloat16) if gpu else (1024, "cpu", torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 10:
        begin = time.perf_counter()
        for _ in range(10):
            a @ b
        if gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / 10)
    print(json.dumps(2 * n**3 / statistics.median(times[2:])))  # the first are warm-up


def hold(free_gib: float) -> None:
    """Allocate until `free_gib` GiB of the card are free, print the bytes that are, and keep it until stdin is closed."""
    if not torch.cuda.is_available():
        raise BadInput("there is no GPU to hold memory of")
    kept: list[torch.Tensor] = []
    for size in (GIB, 2**26, 2**24):  # the allocator asks the driver for just these sizes
        while torch.cuda.mem_get_info()[0] - size >= free_gib * GIB:
            kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    print(torch.cuda.mem_get_info()[0], flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def only(free_gib: float | None) -> Iterator[None]:
    """Within the block the card has `free_gib` GiB free; None leaves it as it is. Raises BadInput when it has less."""
    if free_gib is None:
        yield
        return
    command = [sys.executable, __file__, "--hold", str(free_gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        said = holder.stdout.readline()
        if not said or int(said) < free_gib * GIB - 2**26:
            free = f"{int(said) / GIB:.2f} GiB are" if said else "holding the rest failed, see above"
            raise BadInput(f"{free_gib:g} GiB of the card must be free: {free}")
        yield


# --- report -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any] | None:
    """The report, or None if there is none yet. Raises BadInput when it is damaged."""
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or set(report) != {"facts", "commit", "peak_flops", "runs"}:
            raise ValueError("its keys are others")
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{path} is no report of this script, or damaged ({error}); move it away to start again"
        ) from error
    return report


def save(path: Path, report: dict[str, Any]) -> None:
    """The JSON, and the page beside it."""
    for suffix, text in ((".json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"), (".md", page(report))):
        with atomic_write(path.with_suffix(suffix)) as handle:
            handle.write(text)


def groups(report: dict[str, Any]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """{(recipe, variant, part of the card): its repetitions}, in the order of their first run."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for name, result in report["runs"].items():
        recipe, variant, card, _ = name.split(", ")
        found.setdefault((recipe, variant, card), []).append(result)
    return found


def speed(runs: list[dict[str, Any]]) -> float | None:
    """Tokens/s, median of the repetitions; None if one failed or none was run."""
    if not runs or any(result["status"] != "ok" for result in runs):
        return None
    return statistics.median(result["tokens_per_s"] for result in runs)


def memory_cell(runs: list[dict[str, Any]], key: str) -> str:
    """The largest of a memory figure over the repetitions, in GiB, and how far off the planner's figure is."""
    measured = max((result["memory"].get(key) or 0 for result in runs), default=0)
    if not measured:
        return "–"
    expected = runs[-1]["planned"].get(key)
    plan = f" (planned {expected / GIB:.2f}, {expected / measured - 1:+.0%})" if expected else ""
    return f"{measured / GIB:.2f}{plan}"


def row(key: tuple[str, str, str], report: dict[str, Any]) -> list[str]:
    """One line of the page's table."""
    found = groups(report)
    runs, (recipe, variant, card) = found[key], key
    bad = next((result for result in runs if result["status"] != "ok"), None)
    rate = speed(runs)
    if bad or not rate:
        well = sum(result["status"] == "ok" for result in runs)
        reason = f"**{bad['status']}**: {bad['reason']}".replace("|", "/") if bad else "–"
        return [*key, f"{well} of {len(runs)}", reason, *["–"] * 9]
    rates = sorted(result["tokens_per_s"] for result in runs)
    spread = f" ({rates[0]:,.0f} to {rates[-1]:,.0f})" if len(rates) > 1 else ""
    others = [speed(found.get((recipe, name, card), [])) if variant != name else None for name in ("ours", "kafka")]
    mfu = rate * runs[-1]["flops_per_token"] / report["peak_flops"]
    loading = max(result["memory"].get("peak_while_loading") or 0 for result in runs)
    higher = loading > max(result["memory"].get("peak_allocated") or 0 for result in runs)
    retries = max(result["memory"].get("retries") or 0 for result in runs)
    driver = max(result["driver_peak"] or 0 for result in runs)
    return [
        *key,
        str(len(runs)),
        f"{rate:,.0f}{spread}",
        *(f"{rate / other:.2f}" if other else "–" for other in others),
        f"{statistics.median(result['step_s'] for result in runs) * 1000:,.0f}",
        f"{mfu:.0%}",
        *(memory_cell(runs, moment) for moment in ("loaded", "at_optimizer_step")),
        memory_cell(runs, "peak_allocated") + (f" (loading {loading / GIB:.2f})" if higher else ""),
        memory_cell(runs, "peak_reserved") + (f" ({retries} retries)" if retries else ""),
        f"{driver / GIB:.2f}" if driver else "–",
    ]


def page(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    facts = report["facts"]
    where = ", ".join(f"{key} {value}" for key, value in facts["machine"].items() if value)
    used = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    head = ["recipe", "variant", "card", "runs", "tokens/s", "x ours", "x kafka", "ms per step", "MFU", "loaded, GiB"]
    head += ["optimiser step, GiB", "peak, GiB", "reserved, GiB", "driver, GiB"]
    lines = [
        "# Speed and memory of the recipes\n" if facts["machine"]["gpu"] else "# A test of bench/gpu.py on a CPU\n",
        f"{facts['what']} {facts['parameters']:,} parameters. {where}. {used}. {commit(report['commit'])}.\n",
        f"Achievable peak: {report['peak_flops'] / 1e12:,.3g} TFLOP/s, by large matrix products. "
        "What the columns mean: [bench/README.md](../README.md).\n",
        tabulate([row(key, report) for key in groups(report)], head, tablefmt="pipe", disable_numparse=True),
    ]
    return "\n".join(lines) + "\n"


# --- the command ------------------------------------------------------------------------------------------------------


def measure(item: Run, base: PretrainedConfig, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """The result of one run."""
    config = item.trained(args.tiny)
    probe = {
        "output_dir": f"{item.folder}/output",
        "plugins": [*config["plugins"], "bench.gpu_plugin.Probe"],
        "probe_record": f"{item.folder}/record.json",
        "probe_seconds": args.seconds,
        "probe_warmup": args.warmup,
    }
    expected = {"flops_per_token": flops_per_token(base, config), "planned": planned(base, config)}
    try:
        with only(None if args.tiny else item.free_gib):
            result = launch(item, args.work, config | probe, args.tiny, limit)
    except BadInput as error:
        result = {"status": "failed", "reason": str(error), "wall_s": 0.0, "driver_peak": None}
    shutil.rmtree(args.work / item.folder / "output", ignore_errors=True)
    return {**expected, **result}


def fingerprint(item: Run, model: dict[str, Any], tiny: bool) -> str:
    """A hash of what a run's figures depend on: recipe with changes, environment, model."""
    return digest({"config": item.trained(tiny), "environment": item.environment, "model": model})[:16]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run that would end after this time")
    parser.add_argument("--repetitions", type=int, default=3, help="of ours and kafka (default: 3)")
    parser.add_argument(
        "--only", metavar="PATTERN", default="*", help="runs whose name matches, with * and ?; see --list"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the runs, and what became of them")
    parser.add_argument("--seconds", type=float, default=15, help="how long each run is timed (default: 15)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before that (default: 4)")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a run has failed (default: 300)")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of rows per recipe (default: 2,000,000)")
    parser.add_argument("--base", type=Path, default=ROOT / "train/tinyllama.json", help="config.json of another size")
    parser.add_argument(
        "--ablations", type=Path, default=ROOT / "bench/ablations.yml", help="default: bench/ablations.yml"
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with a tiny model: tests this script")
    parser.add_argument("--work", type=Path, help="folder for weights, rows and logs (default: bench/run/gpu)")
    parser.add_argument("--out", type=Path, help="default: bench/reports/gpu.json; with --tiny in the work folder")
    parser.add_argument("--hold", type=float, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)  # likewise
    args = parser.parse_args()
    if args.warmup < 1 or args.seconds <= 0 or args.repetitions < 1:
        raise BadInput("--warmup and --repetitions must be at least 1, --seconds more than 0")
    args.work = (args.work or ROOT / "bench/run" / ("gpu-tiny" if args.tiny else "gpu")).absolute()
    args.out = args.out or (args.work / "report/gpu.json" if args.tiny else ROOT / "bench/reports/gpu.json")
    return args


def main() -> None:
    args = parse()
    if args.hold is not None:
        return hold(args.hold)
    if args.peak:
        return measure_peak()
    end = time.monotonic() + 60 * args.minutes
    ours, kafka = load_chain(ROOT / "recipes"), load_chain(ROOT / "bench/kafka")
    kafka = [stage for stage in kafka if not stage.adapter_from]  # a continued adapter costs what a new one does
    everything = schedule(ours, kafka, load_ablations(args.ablations, ours), args.repetitions)
    chosen = [item for item in everything if fnmatch.fnmatchcase(item.id, args.only)]
    if not chosen:
        raise BadInput(f"no run matches {args.only!r}; --list prints every run")
    base = tiny_config() if args.tiny else planner.load_config(args.base)
    report = load(args.out)
    if args.list:
        for item in chosen:
            print(f"{item.id:60} {report['runs'].get(item.id, {}).get('status', '') if report else ''}")
        return None

    facts = {
        "what": "A tiny model: no measurement of the recipes." if args.tiny else "A model with random weights.",
        "machine": machine(gpu=not args.tiny),
        "versions": versions(*PACKAGES),
        "model": json.loads(base.to_json_string()),  # before it is built: Transformers adds to it
        "parameters": planner.build(base, {}).num_parameters(),
        "settings": {"seconds": args.seconds, "warmup": args.warmup},
    }
    report = report or {"facts": facts, "commit": None, "peak_flops": 0.0, "runs": {}}
    differing = [key for key in facts if report["facts"].get(key) != facts[key]]
    if differing:  # such figures cannot be compared
        raise BadInput(f"{args.out} was made with another {', '.join(differing)}; name another file with --out")
    marks = {item.id: fingerprint(item, facts["model"], args.tiny) for item in chosen}
    todo = [item for item in chosen if report["runs"].get(item.id, {}).get("fingerprint") != marks[item.id]]
    if not todo:
        print(f"all {len(chosen)} runs are in {args.out}")
        return None
    make_inputs(args.work, base, ours, args.tokens)
    said = subprocess.run([sys.executable, __file__, "--peak"], capture_output=True, text=True)
    if said.returncode:
        raise BadInput(f"timing the matrix product failed: {said.stderr.strip().splitlines()[-1:]}")
    # The best of all calls: what disturbs the machine only makes it slower.
    report["peak_flops"] = max(report["peak_flops"], float(said.stdout.splitlines()[-1]))
    left = len(todo)
    for item in (bar := tqdm(todo, unit="run")):
        took = [result["wall_s"] for result in report["runs"].values() if result["status"] == "ok"]
        needed = 1.3 * statistics.median(took) if took else args.seconds + 60
        if end - time.monotonic() < needed:
            break
        bar.set_postfix_str(item.id)
        limit = min(end - time.monotonic(), args.limit)
        result = measure(item, base, args, limit)
        if result["status"] == "timed out" and limit < args.limit:
            break  # --minutes ended it: no result
        report["commit"] = git_state()
        report["runs"][item.id] = {"fingerprint": marks[item.id], **result}
        save(args.out, report)
        left -= 1
        speed_said = f"{result['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in result else result.get("reason", "")
        tqdm.write(f"{item.id}: {result['status']} {speed_said}")
    again = "; run again to continue" if left else ""
    print(f"{args.out.with_suffix('.md')}: {left} of {len(chosen)} runs are left{again}")
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends the training too
    run(main)
