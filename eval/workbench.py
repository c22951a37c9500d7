"""What the cells of eval/workbench.ipynb stand on: models kept in memory while they fit, text as it is written, pages."""

import contextlib
import gc
import html
import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from eval import logs
from prep.common import BadInput
from train.stages import load_chain

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything read is a local file
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
CGROUP = Path("/sys/fs/cgroup")  # a container's own limits
KEPT = Path("outputs/kept.jsonl")  # relative to the working directory, as all of its paths
CONTINUED = Path("outputs/continuation")  # where eval/continuation.py writes
PAGES = 900  # words of the continued novel that are shown, about three pages of a book
HEADROOM = 1.25  # of the bytes of 16- or 32-bit weights, for what is computed with them and the cache of a context


def places() -> list[Path]:
    """The working directories there are: the one asked for, or else the repository and, once there is one, the demo's.

    The one in which something was last trained comes first.
    """
    if asked := os.environ.get("WORKBENCH_DIR"):
        return [Path(asked)]
    found = [ROOT, *(path for path in [ROOT / "demo/run"] if (path / "outputs").is_dir())]
    return sorted(found, key=lambda path: latest(path / "outputs"), reverse=True)


def newest_first(paths: Iterable[Path]) -> dict[Path, float]:
    """Files, and when each was last written; those removed since they were listed are left out."""
    times = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime
    return dict(sorted(times.items(), key=lambda item: item[1], reverse=True))


def latest(outputs: Path) -> float:
    """When anything under `outputs` was last logged; 0 when nothing was."""
    return max(newest_first(outputs.glob("*/runs/**/events.out.tfevents.*")).values(), default=0.0)


def table(runs: list[logs.Run]) -> str:
    """The state of each run that has logged anything, as an HTML table."""
    known = epochs()
    found = [logs.status(run, float(known.get(run.folder.name, 1))) for run in runs]
    return logs.table([one for one in found if one])


def epochs() -> dict[str, Any]:
    """How many epochs each recipe asks for."""
    return {stage.name: stage.config.get("num_epochs", 1) for stage in load_chain(ROOT / "recipes")}


def free_memory() -> int:
    """Bytes that a model can still take: of this machine, or of what the container may use of it."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    except (OSError, ValueError):
        pass  # no limit of its own: no such file, or the word `max` in it
    return max(0, free)


def stages() -> dict[str, str]:
    """The rows that have weights, {name: what to show}, in the chain's order. Heavy libraries are loaded here."""
    from eval import models

    found = {}
    for row in models.candidates(load_chain(ROOT / "recipes")):
        if row.weights and (row.adapter is None or list(row.model.glob("model*.safetensors"))):
            judged = row.stage is None or row.stage.verdict.is_file()
            found[row.name] = row.name if judged else f"{row.name} (no verdict: half trained?)"
    return found


@dataclass
class Models:
    """The models in memory, each with the state of the files it was read from."""

    device: str
    held: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)  # name: (files, model, tokenizer)

    def free(self) -> int:
        """Bytes free where the models go."""
        if self.device == "cpu":
            return free_memory()
        import torch

        return torch.cuda.mem_get_info()[0]

    def get(self, name: str, say: Callable[[str], None]) -> tuple[Any, Any]:
        """The model and tokenizer of a stage, as the evaluation has them, read anew when its files have changed.

        When memory does not hold it beside the others, those are dropped first, and `say` tells.
        Raises BadInput when the stage is not there (any more), is not whole, or does not fit at all.
        """
        import torch

        from eval import models

        row = models.present(models.candidates(load_chain(ROOT / "recipes")), [name])[0]
        paths = [*row.weights, *([] if row.adapter is None else sorted(row.model.glob("model*.safetensors")))]
        try:
            files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
        except FileNotFoundError as error:
            raise BadInput(f"stage {name} was removed a moment ago ({error.filename})") from error
        if name in self.held and self.held[name][0] == files:
            return self.held[name][1:]
        self.held.pop(name, None)
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        needed = round(HEADROOM * sum(elements(path) for path in paths) * dtype.itemsize)
        if self.held and needed > self.free():
            say(f"{size(needed)} for {name} are not free beside {', '.join(self.held)}: one model at a time.")
            self.drop()
        if needed > self.free():
            raise BadInput(
                f"{name} needs about {size(needed)} of memory, and {size(self.free())} are free: "
                "wait until the training has ended, or stop what else is running"
            )
        say(f"reading {name} ...")
        tokenizer = models.load_tokenizer(row.model)
        model: Any = models.load_model(row.model, tokenizer, self.device, dtype, row.quantization)
        if row.quantization and self.device == "cpu":
            model = (
                model.dequantize()
            )  # the same rounded numbers; a CPU unpacks them too slowly to do it at every token
        if row.adapter:
            model = models.load_adapter(model, row, tokenizer)
        for parameter in model.parameters():
            # What safetensors reads stays tied to the file; a training that writes over it would change, or end, this.
            parameter.data = parameter.data.clone()
        self.held[name] = (files, model, tokenizer)
        return model, tokenizer

    def drop(self) -> None:
        """Free every model."""
        import torch

        self.held.clear()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def elements(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header. Raises BadInput when that is torn."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    except Exception as error:  # safetensors raises its own, of a class that is not public
        raise BadInput(f"{path} is not whole ({error}): is it being written?") from error


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB"


class Stopped(Exception):
    """The reader has pressed Stop."""


def stream(
    model: Any, tokenizer: Any, prompt: str, seed: int, parameters: dict[str, Any],
    show: Callable[[str], None], stop: threading.Event,
) -> str:  # fmt: skip
    """Continue `prompt`, handing the text so far to `show` as it grows; returns the whole continuation.

    Drawn by eval/generation.py, one text from one seed: the same seed and parameters give the same text. Raises BadInput
    when the prompt is empty or too long; returns what there is when `stop` is set.
    """
    from transformers import TextStreamer

    from eval import generation

    if not prompt.strip():
        raise BadInput("there is nothing to continue: write a prompt")
    written: list[str] = []

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            written.append(text)
            show("".join(written))
            if stop.is_set():
                raise Stopped

    streamer = Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        return generation.continuations(model, tokenizer, prompt, 1, seed, parameters, streamer)[0]["text"]
    except Stopped:
        return "".join(written)


def keep(path: Path, sample: dict[str, Any]) -> None:
    """Append a sample, one line of JSON. Whole lines, even when two pages keep something at the same moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"date": datetime.now(UTC).isoformat(timespec="seconds"), **sample}, ensure_ascii=False) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def kept(path: Path) -> list[dict[str, Any]]:
    """The samples kept so far, newest first; lines that are not whole are passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found[::-1]


def reports() -> dict[str, Path]:
    """The reports there are, newest first: {shown name: JSON file}; those of the working directory hide the repository's."""
    folders = dict.fromkeys(path.resolve() for path in (ROOT / "eval/reports", Path("eval/reports")))
    by_name = {path.stem: path for folder in folders for path in folder.glob("*.json")}
    return {path.stem: path for path in newest_first(by_name.values())}


def continued() -> dict[str, Path]:
    """The novels that eval/continuation.py has begun here, newest first: {shown name: its record}."""
    return {path.stem: path for path in newest_first(CONTINUED.glob("*.json"))}


def latest_pages(path: Path) -> str:
    """The last pages of a continued novel, from its record, as HTML, under a line on how they came about.

    The record is replaced whole after every passage, so this can be read while it is written.
    Raises BadInput when the record is gone, torn, or of another version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        parts = "".join(passage["chosen"]["text"] for passage in record["passages"]).strip().split("\n\n")
        faulty, number = record["passages_with_faults"], len(record["passages"])
        by = (
            f"{record['stage']} goes on from {record['beginning']['source']}, seed {record['settings']['seed']}: "
            f"{record['words']:,} words in {number} passages, "
            f"{faulty or 'none'} of which {'break' if faulty > 1 else 'breaks'} a rule."
        )
    except FileNotFoundError as error:
        raise BadInput(f"{path} was removed a moment ago") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error!r}): remove it, and `make continue` begins anew") from error
    words, start = 0, len(parts)
    while start and words < PAGES:
        start -= 1
        words += len(parts[start].split())
    earlier = record["words"] - words
    whole = f"The whole text: {path.with_suffix('.txt')}, and .epub once it is done."
    if earlier > 0:
        whole = f"Its last {words:,} words; {earlier:,} stand before them. {whole}"
    return (
        f'<div class="prose"><p class="by">{html.escape(by)}<br>{html.escape(whole)}</p>'
        + paragraphs("\n\n".join(parts[start:]))
        + "</div>"
    )


def report_page(path: Path, height: int = 900) -> str:
    """A report's own page, made from its JSON, in a frame. Raises BadInput when it is torn or of another version."""
    from eval import report

    content = report.load(path)
    page = html.escape(report.html(content, report.draw(content)), quote=True)
    return f'<iframe sandbox class="report" style="height:{height}px" srcdoc="{page}"></iframe>'


def novel(path: Path) -> str:
    """What the last measured stage of a report wrote where the novel breaks off, as HTML; empty when nothing did."""
    from eval import report

    content = report.load(path)
    after = [prompt for prompt in content["prompts"] if prompt["name"] == "suite"]
    written = [
        (name, sample)
        for name, stage in content["stages"].items()
        if stage
        for sample in stage["samples"]
        if after and sample["prompt"] == "suite"
    ]
    if not written:
        return ""
    last = written[-1][0]
    pages = [paragraphs(sample["text"]) for name, sample in written if name == last]
    return (
        f'<div class="prose"><div class="given">{paragraphs(after[0]["text"])}</div>'
        + f"<p class='by'>{html.escape(last)} goes on:</p>"
        + "<hr>".join(pages)
        + "</div>"
    )


def paragraphs(text: str) -> str:
    """Text as HTML paragraphs."""
    return "".join(f"<p>{html.escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())
