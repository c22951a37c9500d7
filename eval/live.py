"""A training while it runs: what it has logged up to this moment, read from its TensorBoard files.

The trainer's own state (eval/curves.py) is written at checkpoints only; these files grow at every logged step, and are
read from where the last look ended. A file whose end is being written is read up to its last whole record.
"""

import html
import json
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from eval.pictures import COLOURS, figure

# Our names, and the logger's.
SCALARS = {
    "loss": "train/loss",
    "eval_loss": "eval/loss",
    "learning_rate": "train/learning_rate",
    "epoch": "train/epoch",
    "tokens": "train/tokens/total",
    "tokens_per_second": "train/tokens/train_per_sec_per_gpu",
    "memory": "train/memory/device_reserved (GiB)",
}
NAMES = {logged: name for name, logged in SCALARS.items()}
SILENT = 15 * 60  # seconds without a word after which a run is no longer called running: longer than a validation takes


@dataclass
class Run:
    """One stage's training. `points` has, by step, what was logged then, and `time`, seconds since 1970."""

    folder: Path  # outputs/2b
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    loaders: dict[Path, EventFileLoader] = field(default_factory=dict)

    def refresh(self) -> None:
        """Read what has been added. A run that was begun anew, or whose files are gone, is read anew."""
        files = sorted(self.folder.glob("runs/**/events.out.tfevents.*"), key=lambda path: path.name)
        if any(path not in files for path in self.loaders):
            self.points, self.loaders = {}, {}
        for path in files:
            loader = self.loaders.setdefault(path, EventFileLoader(str(path)))
            for event in loader.Load():
                for value in event.summary.value:
                    name = NAMES.get(value.tag)
                    if name == "loss" and self.points and event.step <= next(reversed(self.points)):
                        # A resumed run repeats the steps since its checkpoint: what stood there before is no part of it.
                        self.points = {step: point for step, point in self.points.items() if step < event.step}
                    if name:
                        point = self.points.setdefault(event.step, {})
                        point[name] = float(tensor_util.make_ndarray(value.tensor))
                        point["time"] = event.wall_time

    def series(self, name: str, unit: str = "") -> tuple[list[float], list[float]]:
        """What was logged under `name`, over `tokens` or `steps`; by default over the run's own unit."""
        unit = unit or self.unit
        seen, across, up = 0.0, [], []
        for step, point in sorted(self.points.items()):
            seen = float(step) if unit == "steps" else point.get("tokens", seen)
            if name in point:
                across.append(seen)
                up.append(point[name])
        return across, up

    @property
    def unit(self) -> str:
        """`tokens`, or `steps` where the trainer counted none."""
        return "tokens" if any("tokens" in point for point in self.points.values()) else "steps"

    def last(self, name: str) -> float | None:
        """The newest value of `name`."""
        return next((point[name] for _, point in sorted(self.points.items(), reverse=True) if name in point), None)


def planned_steps(folder: Path, step: int, epoch: float | None, epochs: float) -> int | None:
    """How many steps the run is to have: as its last whole checkpoint or its start says, or reckoned from the epochs done.

    None before there is anything to go by.
    """
    from train.gate import checkpoints  # torch comes with it, which an empty page does not wait for

    for checkpoint in reversed(checkpoints(folder)):
        try:
            return int(json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"])
        except (OSError, ValueError, KeyError, TypeError):  # being written, or removed since it was listed
            continue
    try:
        overrides = json.loads((folder / "started.json").read_text())["overrides"]
        return int(next(text for text in overrides if text.startswith("--max_steps=")).partition("=")[2])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return round(step * epochs / epoch) if epoch else None


@dataclass(frozen=True)
class Status:
    """Where a run stands. Rates and memory are None where nothing was logged, as GPU memory on a CPU."""

    name: str
    state: str  # running, trained, stopped
    step: int
    planned: int | None
    seconds_left: float | None
    silent: float  # seconds since the last word
    figures: dict[str, float | None]


def status(run: Run, epochs: float, now: float | None = None) -> Status | None:
    """Where a run stands now; None when it has logged nothing yet."""
    if not run.points:
        return None
    now = time.time() if now is None else now
    steps = sorted(step for step, point in run.points.items() if "loss" in point)
    step = steps[-1] if steps else max(run.points)
    silent = now - max(point["time"] for point in run.points.values())
    planned = planned_steps(run.folder, step, run.last("epoch"), epochs)
    finished = (run.folder / "trained.json").is_file()
    state = "trained" if finished else "running" if silent < SILENT else "stopped"
    left = None
    if state == "running" and planned and len(steps) > 1:
        recent = steps[-30:]
        # The middle of the last intervals: a validation between two steps does not count as the pace.
        paces = [(run.points[b]["time"] - run.points[a]["time"]) / (b - a) for a, b in pairwise(recent)]
        left = max(0.0, (planned - step) * statistics.median(paces))
    figures = {name: run.last(name) for name in SCALARS}
    figures["memory"] = figures["memory"] or None
    return Status(run.folder.name, state, step, planned, left, silent, figures)


def duration(seconds: float | None) -> str:
    """3725 -> 1 h 02 min."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def table(statuses: list[Status]) -> str:
    """The runs as an HTML table, a row a run."""
    rows = []
    for one in statuses:
        words = {
            "running": f"running, heard of {duration(one.silent)} ago",
            "trained": "trained, past its gate",
            "stopped": f"not running: silent for {duration(one.silent)}, no verdict",
        }[one.state]
        of = f" of {one.planned:,}" if one.planned else ""
        bar = f'<progress value="{one.step}" max="{one.planned}"></progress> ' if one.planned else ""
        cells = [
            f"<b>{html.escape(one.name)}</b>",
            f'<span class="{one.state}">{words}</span>',
            f"{bar}{one.step:,}{of}",
            duration(one.seconds_left),
            *(
                "" if one.figures[name] is None else format(one.figures[name], form)
                for name, form in (
                    ("loss", ".3f"),
                    ("eval_loss", ".3f"),
                    ("learning_rate", ".2e"),
                    ("tokens", ",.0f"),
                    ("tokens_per_second", ",.0f"),
                    ("memory", ".1f"),
                )
            ),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    titles = (
        "run", "state", "step", "time left", "loss", "validation", "learning rate", "tokens", "tokens/s", "GPU GiB"
    )  # fmt: skip
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f'<table class="runs"><tr>{head}</tr>{"".join(rows)}</table>'


def draw(runs: list[Run]) -> Figure | None:
    """Loss above, learning rate below, every run in its colour on one axis; None when nothing is logged yet."""
    runs = [run for run in runs if any("loss" in point for point in run.points.values())]
    if not runs:
        return None
    unit = "tokens" if all(run.unit == "tokens" for run in runs) else "steps"
    picture = figure(9.2, 4.6)
    upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)]
        upper.plot(*run.series("loss", unit), color=colour, linewidth=1.4, label=f"{run.folder.name}, training")
        across, up = run.series("eval_loss", unit)
        if up:
            upper.plot(
                across,
                up,
                color=colour,
                linestyle="--",
                marker="o",
                markersize=4,
                label=f"{run.folder.name}, validation",
            )
        lower.plot(*run.series("learning_rate", unit), color=colour, linewidth=1.4)
    upper.set_ylabel("loss, nats a token")
    lower.set_ylabel("learning rate")
    lower.set_xlabel(f"{unit} of the run")
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lower.set_ylim(bottom=0)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    upper.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


def find(outputs: Path, known: dict[Path, Run]) -> list[Run]:
    """Every run under `outputs`, by name; those already `known` keep what they have read."""
    folders = sorted({path.parent for path in outputs.glob("*/runs")})
    return [known.get(folder) or Run(folder) for folder in folders]


def summary(runs: list[Run], epochs: dict[str, Any]) -> list[Status]:
    """The status of each run that has logged anything; `epochs` of the recipes, by stage."""
    found = [status(run, float(epochs.get(run.folder.name, 1))) for run in runs]
    return [one for one in found if one]
