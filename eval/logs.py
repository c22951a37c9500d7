"""What a training logged: from the trainer's state when it is evaluated, from its TensorBoard files while it runs.

A log is a list of points in the order of their steps. A point has `step`, `epoch`, `tokens` (seen so far), `loss` and
`eval_loss` (nats per token), and None for what was not logged at that step.

    log = logs.training_log(Path("outputs/2a"))
    points = logs.curve(log, logs.unit(log))
"""

import json
import math
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from prep.common import BadInput

# Our names, and the trainer's in trainer_state.json.
LOGGED = {
    "epoch": ("epoch",),
    "tokens": ("tokens/total", "tokens/trainable"),
    "loss": ("loss",),
    "eval_loss": ("eval_loss",),
}
# The trainer's names in its TensorBoard files, and ours.
SCALARS = {
    "train/loss": "loss",
    "eval/loss": "eval_loss",
    "train/learning_rate": "learning_rate",
    "train/epoch": "epoch",
    "train/tokens/total": "tokens",
    "train/tokens/train_per_sec_per_gpu": "tokens_per_second",
    "train/memory/device_reserved (GiB)": "memory",
}
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
    states = []
    for path in [*output_dir.glob("trainer_state.json"), *sorted(output_dir.glob("checkpoint-*/trainer_state.json"))]:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            states.append((state["global_step"], state["log_history"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is damaged ({error!r}); remove it, or train the stage again") from error
    if not states:
        return None
    points: dict[int, dict[str, Any]] = {}
    for entry in max(states, key=lambda state: state[0])[1]:
        point = points.setdefault(entry["step"], {"step": entry["step"], **dict.fromkeys(LOGGED)})
        for key, names in LOGGED.items():
            values = [entry[name] for name in names if entry.get(name) is not None]
            if values and math.isfinite(values[0]):
                point[key] = values[0]
    return [point for _, point in sorted(points.items()) if point["loss"] is not None or point["eval_loss"] is not None]


def unit(log: Log) -> str:
    """`tokens`, or `step` where the trainer did not count tokens at every training loss."""
    return "step" if any(point["tokens"] is None for point in log if point["loss"] is not None) else "tokens"


def curve(log: Log, unit: str) -> list[tuple[float, float | None, float | None]]:
    """(tokens or step, training loss, validation loss) of each point.

    Validation is logged without a token count: it gets the count of the training loss before it.
    """
    points, seen = [], 0.0
    for point in log:
        seen = point[unit] if point[unit] is not None else seen
        points.append((seen, point["loss"], point["eval_loss"]))
    return points


@dataclass
class Run:
    """One stage's training while it runs. `points` has, by step, what was logged, and `time` in seconds since 1970."""

    folder: Path  # outputs/2b
    points: dict[int, dict[str, Any]] = field(default_factory=dict)
    loaders: dict[Path, Any] = field(default_factory=dict)

    def refresh(self) -> None:
        """Read what was added since the last call; from the start when a file that was read is gone."""
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray

        files = sorted(self.folder.glob("runs/**/events.out.tfevents.*"), key=lambda path: path.name)
        if any(path not in files for path in self.loaders):
            self.points, self.loaders = {}, {}
        for path in files:
            loader = self.loaders.setdefault(path, EventFileLoader(str(path)))
            for event in loader.Load():  # up to the last whole record
                for value in event.summary.value:
                    name = SCALARS.get(value.tag)
                    if name == "loss" and self.points and event.step <= next(reversed(self.points)):
                        # A resumed run repeats the steps after its checkpoint; what was logged for them before is dropped.
                        self.points = {step: point for step, point in self.points.items() if step < event.step}
                    if name:
                        point = self.points.setdefault(
                            event.step, {"step": event.step, **dict.fromkeys(SCALARS.values())}
                        )
                        point[name] = float(make_ndarray(value.tensor))
                        point["time"] = event.wall_time

    @property
    def log(self) -> Log:
        return [point for _, point in sorted(self.points.items())]

    def last(self, name: str) -> float | None:
        """The newest value of `name`."""
        return next((point[name] for point in reversed(self.log) if point[name] is not None), None)


def find(outputs: Path, known: dict[Path, Run]) -> list[Run]:
    """Every run under `outputs`, by name, read up to now; `known` runs continue from what they have read."""
    folders = sorted({path.parent for path in outputs.glob("*/runs")})
    runs = [known.get(folder) or Run(folder) for folder in folders]
    for run in runs:
        run.refresh()
    return runs


def planned_steps(folder: Path, step: int, epoch: float | None, epochs: float) -> int | None:
    """How many steps the run will have: its --max_steps, or from the epochs done so far. None before anything tells."""
    try:
        return int(json.loads((folder / "started.json").read_text())["settings"]["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):  # not given, or being written
        return round(step * epochs / epoch) if epoch else None


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


def status(run: Run, epochs: float, now: float) -> list[str]:
    """The cells of a run in `table`, at a time in seconds since 1970. Empty where nothing was logged, as GPU memory on a CPU."""
    last = {name: run.last(name) for name in SCALARS.values()}
    step = next((point["step"] for point in reversed(run.log) if point["loss"] is not None), run.log[-1]["step"])
    planned = planned_steps(run.folder, step, last["epoch"], epochs)
    silent = now - max(point["time"] for point in run.log)
    left = None
    if (run.folder / "trained.json").is_file():
        state = "trained, gate passed"
    elif silent < SILENT:
        state = f"running, last update {duration(silent)} ago"
        left = seconds_left(run, planned) if planned else None
    else:
        state = f"stopped: no update for {duration(silent)}, no verdict"
    of = f" of {planned:,} ({step / planned:.0%})" if planned else ""
    last["memory"] = last["memory"] or None
    cells = ["" if last[name] is None else format(last[name], form) for name, form in SHOWN.items()]
    return [run.folder.name, state, f"{step:,}{of}", "" if left is None else duration(left), *cells]


def table(runs: list[Run], epochs: dict[str, float], now: float | None = None) -> str:
    """The runs that have logged anything as an HTML table, a row a run; `epochs` has those that their recipes ask for."""
    rows = [status(run, epochs.get(run.folder.name, 1), now or time.time()) for run in runs if run.points]
    head = ["run", "state", "step", "time left", "loss", "validation", "learning rate", "tokens", "tokens/s", "GPU GiB"]
    return tabulate(rows, head, tablefmt="html", disable_numparse=True)
