"""What a training logged: from the trainer's state when it is evaluated, from its log while it runs.

A log is a list of points in the order of their steps. A point has `step`, `epoch`, `tokens` (seen so far), `loss` and
`eval_loss` (nats per token), and None for what was not logged at that step.

    log = logs.training_log(Path("outputs/2a"))
    points = logs.curve(log)
"""

import contextlib
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from prep.common import read_json
from train.stages import LOG

# Our names, and the trainer's.
LOGGED = {
    "epoch": "epoch",
    "tokens": "tokens/total",
    "loss": "loss",
    "eval_loss": "eval_loss",
    "learning_rate": "learning_rate",
    "tokens_per_second": "tokens/train_per_sec_per_gpu",
    "memory": "memory/device_reserved (GiB)",
}
EVIDENCE = ("epoch", "tokens", "loss", "eval_loss")  # what a report holds of them
# What the table shows of them, and how.
SHOWN = {
    "loss": ".3f",
    "eval_loss": ".3f",
    "learning_rate": ".2e",
    "tokens": ",.0f",
    "tokens_per_second": ",.0f",
    "memory": ".1f",
}
SILENT = 15 * 60  # seconds without an update after which a run counts as stopped: longer than a validation takes

Log = list[dict[str, Any]]


def training_log(output_dir: Path) -> Log | None:
    """The log of a stage's last checkpoint; None when no state is left. Raises BadInput on a damaged file."""
    states = [
        read_json(path, "train the stage again", lambda state: (state["global_step"], state["log_history"]))
        for path in output_dir.glob("checkpoint-*/trainer_state.json")
    ]
    if not states:
        return None
    points: dict[int, dict[str, Any]] = {}
    for entry in max(states, key=lambda state: state[0])[1]:
        point = points.setdefault(entry["step"], {"step": entry["step"], **dict.fromkeys(EVIDENCE)})
        found = {key: entry.get(LOGGED[key]) for key in EVIDENCE}
        point |= {key: value for key, value in found.items() if value is not None and math.isfinite(value)}
    return [point for _, point in sorted(points.items()) if point["loss"] is not None or point["eval_loss"] is not None]


def curve(log: Log) -> list[tuple[float, float | None, float | None]]:
    """(tokens, training loss, validation loss) of each point.

    Validation is logged without a token count: it gets the count of the training loss before it.
    """
    points, seen = [], 0.0
    for point in log:
        seen = point["tokens"] or seen
        points.append((seen, point["loss"], point["eval_loss"]))
    return points


@dataclass
class Run:
    """One stage's training while it runs. `points` has, by step, what was logged, and `time` in seconds since 1970."""

    folder: Path  # outputs/2b
    points: dict[int, dict[str, Any]] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)  # the newest line of the log: `time`, `step`, `max_steps`
    read: int = 0  # bytes of the log

    def refresh(self) -> None:
        """Read what was added since the last call; from the start when the log is another."""
        path = self.folder / LOG
        if not path.exists() or path.stat().st_size < self.read:
            self.points, self.now, self.read = {}, {}, 0
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.read)
            for text in file:
                if not text.endswith(b"\n"):
                    break  # it is being written
                self.read += len(text)
                with contextlib.suppress(ValueError):  # a line that a full disk cut short
                    self.add(json.loads(text))

    def add(self, line: dict[str, Any]) -> None:
        """A line of the log. A resumed run repeats the steps after its checkpoint: what was logged for them is dropped."""
        step = line["step"]
        if self.now and step < self.now["step"]:
            self.points = {each: point for each, point in self.points.items() if each <= step}
        self.now = line
        found = {key: line[name] for key, name in LOGGED.items() if name in line}
        if found:
            point = self.points.setdefault(step, {"step": step, **dict.fromkeys(LOGGED)})
            point |= {**found, "time": line["time"]}

    @property
    def log(self) -> Log:
        return [point for _, point in sorted(self.points.items())]

    def last(self, name: str) -> float | None:
        """The newest value of `name`."""
        return next((point[name] for point in reversed(self.log) if point[name] is not None), None)


def find(outputs: Path, known: dict[Path, Run]) -> list[Run]:
    """Every run under `outputs`, by name, read up to now; `known` runs continue from what they have read."""
    folders = sorted(path.parent for path in outputs.glob(f"*/{LOG}"))
    runs = [known.get(folder) or Run(folder) for folder in folders]
    for run in runs:
        run.refresh()
    return runs


def duration(seconds: float) -> str:
    """3725 -> 1 h 02 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def seconds_left(run: Run, planned: int) -> float | None:
    """From the median pace of the last steps: a validation between two of them does not count. None for a first step."""
    losses = [point for point in run.log if point["loss"] is not None][-30:]
    paces = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(losses)]
    return max(0.0, (planned - losses[-1]["step"]) * statistics.median(paces)) if paces else None


def status(run: Run, now: float) -> list[str]:
    """The cells of a run in `table`, at a time in seconds since 1970. Empty where nothing was logged, as GPU memory on a CPU."""
    last = {name: run.last(name) for name in LOGGED}
    step, planned, silent = run.now["step"], run.now["max_steps"], now - run.now["time"]
    left = None
    if (run.folder / "trained.json").is_file():
        state = "trained, gate passed"
    elif silent < SILENT:
        state = f"running, last update {duration(silent)} ago"
        left = seconds_left(run, planned)
    else:
        state = f"stopped: no update for {duration(silent)}, no verdict"
    last["memory"] = last["memory"] or None
    cells = ["" if last[name] is None else format(last[name], form) for name, form in SHOWN.items()]
    done = f"{step:,} of {planned:,} ({step / planned:.0%})"
    return [run.folder.name, state, done, "" if left is None else duration(left), *cells]


def table(runs: list[Run], now: float | None = None) -> str:
    """The runs that have logged anything as an HTML table, a row a run."""
    rows = [status(run, now or time.time()) for run in runs if run.points]
    head = ["run", "state", "step", "time left", "loss", "validation", "learning rate", "tokens", "tokens/s", "GPU GiB"]
    return tabulate(rows, head, tablefmt="html", disable_numparse=True)
