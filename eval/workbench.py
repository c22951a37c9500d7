"""What eval/workbench.ipynb calls: models kept in memory while they fit, text as it is written, pages as HTML.

model, tokenizer = workbench.Models("cpu").get("2b", print)
"""

import contextlib
import errno
import fcntl
import gc
import html
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from prep.common import ROOT, BadInput, read_json
from train.stages import LOG, load_chain

CGROUP = Path("/sys/fs/cgroup")  # a container's own limits
KEPT = Path("outputs/kept.jsonl")  # relative to the working directory, as all paths here
CONTINUED = Path("outputs/continuation")  # where eval/continuation.py writes
READING = ".reading.html"  # how the names of eval/reading.py's pages end
PAGES = 900  # words of the continued novel that are shown, about three pages of a book
HEADROOM = 1.25  # of the bytes of 16- or 32-bit weights, for what is computed with them and the cache of a context


def places() -> list[Path]:
    """WORKBENCH_DIR, or the repository and the demo's folder; the one in which something was last trained comes first."""
    if asked := os.environ.get("WORKBENCH_DIR"):
        return [Path(asked)]
    found = [path for path in (ROOT, ROOT / "demo/run") if path == ROOT or (path / "outputs").is_dir()]

    def latest(path: Path) -> float:
        return max(newest_first(path.glob(f"outputs/*/{LOG}")).values(), default=0.0)

    return sorted(found, key=latest, reverse=True)


def newest_first(paths: Iterable[Path]) -> dict[Path, float]:
    """{file: when it was last written}, without those removed since they were listed."""
    times = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime
    return dict(sorted(times.items(), key=lambda item: item[1], reverse=True))


def free_memory() -> int:
    """Bytes of memory that are free, on this machine or within the container's limit."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no limit: no such file, or the word `max` in it
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return max(0, free)


def stages() -> dict[str, str]:
    """{shown name: row} of the rows that have weights, in the chain's order. Imports the heavy libraries."""
    from eval import models

    rows = [
        row for row in models.candidates(load_chain(ROOT / "recipes")) if row.weights and models.full_weights(row.model)
    ]
    whole = {row.name for row in rows if row.stage is None or row.stage.verdict.is_file()}
    named = {row.name if row.name in whole else f"{row.name} (no verdict: half trained?)": row.name for row in rows}
    return named | {path.name: str(path) for path in sorted(Path("outputs/export").glob("*/*.gguf"))}


@dataclass
class Models:
    """The models in memory, each with the state of the files it was read from."""

    device: str
    held: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)  # name: (files, model, tokenizer)

    def free(self, gguf: bool = False) -> int:
        """Bytes free where the models go; llama.cpp's are on the CPU."""
        if gguf or self.device == "cpu":
            return free_memory()
        import torch

        return torch.cuda.mem_get_info()[0]

    def get(self, name: str, say: Callable[[str], None]) -> tuple[Any, Any]:
        """The model and tokenizer of a stage, as the evaluation loads them, read again when its files have changed.

        When memory does not hold it beside the others, those are dropped first, and `say` is told.
        Raises BadInput when the stage is not there (any more), is not whole, or does not fit at all.
        """
        import torch

        from eval import models

        row = models.writer(load_chain(ROOT / "recipes"), name)
        paths = list(dict.fromkeys([*row.weights, *models.full_weights(row.model)]))
        try:
            files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
        except FileNotFoundError as error:
            raise BadInput(f"stage {name} was removed a moment ago ({error.filename})") from error
        if name in self.held and self.held[name][0] == files:
            return self.held[name][1:]
        self.held.pop(name, None)
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        sizes = (path.stat().st_size if row.form else elements(path) * dtype.itemsize for path in paths)
        needed = round(HEADROOM * sum(sizes))
        if needed > self.free(bool(row.form)):
            if self.held:
                say(f"{size(needed)} for {name} are not free beside {', '.join(self.held)}: one model at a time.")
            self.drop()  # and what torch keeps of models that are gone
        if needed > self.free(bool(row.form)):
            raise BadInput(
                f"{name} needs about {size(needed)} of memory, and {size(self.free(bool(row.form)))} are free: "
                "wait until the training has ended, or stop what else is running"
            )
        say(f"reading {name} ...")
        model: Any
        [(_, model, tokenizer)] = models.loaded([row], self.device, dtype)
        for parameter in model.parameters():
            # safetensors maps the file into memory: a training that writes over it would change this, or end it.
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
    """The user pressed Stop."""


def stream(
    model: Any, tokenizer: Any, prompt: str, seed: int, parameters: dict[str, Any],
    show: Callable[[str], None], stop: threading.Event,
) -> str:  # fmt: skip
    """The continuation of `prompt`; `show` gets the text so far as it grows.

    The same seed and parameters give the same text as the report's samples. Returns what there is when `stop` is set.
    Raises BadInput when the prompt is empty or too long.
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
    """Append a sample, one line of JSON, with the time."""
    append(path, json.dumps({"date": datetime.now(UTC).isoformat(timespec="seconds"), **sample}, ensure_ascii=False))


def append(path: Path, line: str) -> None:
    """Append a line, also when two pages do so at once. A full disk is an OSError, and no half line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (line + "\n").encode()
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def reading_report(page: Path) -> Path:
    """The report of a page of blind reading."""
    return page.with_name(page.name.removesuffix(READING) + ".json")


def answered(page: Path, lines: str) -> None:
    """Append what a page of blind reading has sent, all answers so far, to its reader's file: those that are not there yet."""
    from eval import reading

    for line in lines.splitlines():
        path = reading.answers_file(reading_report(page), json.loads(line)["reader"])
        if not path.is_file() or line not in path.read_text(encoding="utf-8").splitlines():
            append(path, line)


def kept(path: Path) -> str:
    """The samples kept so far, newest first, as HTML; lines that are no sample are skipped and counted."""
    parts: list[str] = []
    damaged = 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            sample = json.loads(line)
            by = "{stage}, seed {seed}, temperature {temperature}, {date}".format(**sample)
            parts.insert(0, prose(by, sample["prompt"] + sample["text"]))
        except (ValueError, KeyError, TypeError):
            damaged += 1
    skipped = [note(f"Lines of {path} that are damaged and skipped: {damaged}.")] if damaged else []
    return "<hr>".join(skipped + parts) or note("Nothing kept yet.")


def reports() -> dict[str, Path]:
    """{name: page}: reports and comparisons, newest first, then blind readings; the working directory's hide the repository's."""
    folders = dict.fromkeys(path.resolve() for path in (ROOT / "eval/reports", Path("eval/reports")))
    by_name = {path.stem: path for folder in folders for path in folder.glob("*.html")}
    pages = newest_first(by_name.values())
    return {path.stem: path for path in sorted(pages, key=lambda path: path.name.endswith(READING))}


def report_page(path: Path) -> str:
    """A report's page in a frame. A blind reading's has scripts, which act as this page does: it is made from its report again,
    so that they are the project's own, whatever the file holds."""
    if path.name.endswith(READING):
        from eval import report

        made = report.load(reading_report(path))
        if "reading" not in made:
            raise BadInput(
                f"{path} is of pairs that {reading_report(path)} has no more: draw them again (make reading)"
            )
        sandbox, text = "", report.reading_page(made)
    else:
        sandbox, text = "sandbox", path.read_text(encoding="utf-8")
    return f'<iframe {sandbox} class="report" srcdoc="{html.escape(text, quote=True)}"></iframe>'


def continued() -> dict[str, Path]:
    """{name: record} of the continuations that eval/continuation.py has begun here, newest first."""
    return {path.stem: path for path in newest_first(CONTINUED.glob("*.json"))}


def latest_pages(path: Path) -> str:
    """The last pages of a continued novel, from its record, as HTML. It may be read while it is written.

    Raises BadInput when the record is damaged, or of another version.
    """

    def pick(record: dict[str, Any]) -> tuple[list[str], str]:
        parts = "".join(chunk["chosen"]["text"] for chunk in record["chunks"]).strip().split("\n\n")
        return parts, (
            f"{record['stage']} continues {record['beginning']['source']}, seed {record['settings']['seed']}: "
            f"{record['words']:,} words in {len(record['chunks'])} steps, {record['chunks_with_faults']} with a fault. "
        )

    parts, by = read_json(path, "remove it, and `make continue` starts again", pick)
    words, start = 0, len(parts)
    while start and words < PAGES:
        start -= 1
        words += len(parts[start].split())
    shown = f"These are its last {words:,} words. " if start else ""
    whole = f"The whole text: {path.with_suffix('.txt')}, and .epub once it is done."
    return prose(by + shown + whole, "\n\n".join(parts[start:]))


def prose(by: str, text: str) -> str:
    """A text as HTML, under a line on where it is from."""
    return f'<div class="prose"><p class="by">{html.escape(by)}</p>{html.escape(text.strip())}</div>'


def note(text: str) -> str:
    """A message as HTML; `code` between backticks."""
    marked = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))
    return f'<div class="note">{marked}</div>'
