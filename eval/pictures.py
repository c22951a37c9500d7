"""The pictures of a report."""

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from eval.tables import measured

# Okabe & Ito's colours, told apart by every kind of eye; enough for as many tasks as there are.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def figure(width: float, height: float) -> Figure:
    """An empty picture, drawn without a display."""
    return Figure(figsize=(width, height), layout="constrained")


def svg(picture: Figure, name: str) -> str:
    """The picture as SVG, whose text depends on nothing but what is drawn and its name."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        picture.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def draw_losses(report: dict[str, Any]) -> Figure | None:
    """Training and validation loss of every stage that left a log, side by side; None when none did."""
    logs = {name: stage["training"] for name, stage in measured(report).items() if stage["training"]}
    if not logs:
        return None
    picture = figure(3.6 * len(logs) + 0.6, 3.2)
    axes = picture.subplots(1, len(logs), squeeze=False, sharey=True)[0]
    for axis, (name, log) in zip(axes, logs.items(), strict=True):
        unit = "tokens" if all(point["tokens"] is not None for point in log if point["loss"] is not None) else "step"
        seen = 0.0
        positions = []  # validation is logged without a token count: it stands where training stood
        for point in log:
            seen = point[unit] if point[unit] is not None else seen
            positions.append(seen)
        for key, label, colour, mark in (
            ("loss", "training", COLOURS[0], None),
            ("eval_loss", "validation", COLOURS[1], "o"),
        ):
            line = [(x, point[key]) for x, point in zip(positions, log, strict=True) if point[key] is not None]
            if line:
                axis.plot(*zip(*line, strict=True), label=label, color=colour, marker=mark, markersize=4, linewidth=1.4)
        axis.set_title(name)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("loss, nats a token")
    return picture


def draw_bits(report: dict[str, Any]) -> Figure:
    """Bits per byte by stage, a line a text, with 95 % intervals."""
    stages = list(measured(report))
    picture = figure(7.2, 4.2)
    axis = picture.subplots()
    for index, task in enumerate(report["tasks"]):
        points = []
        for place, name in enumerate(stages):
            score = report["stages"][name]["scores"].get(task)
            if score:
                value = score["bits_per_byte"]
                low, high = score["interval"]["bits_per_byte"] or (value, value)
                # The intervals of one stage would hide each other on one vertical line.
                points.append(
                    (place + 0.05 * (index - (len(report["tasks"]) - 1) / 2), value, value - low, high - value)
                )
        if points:
            x, y, below, above = zip(*points, strict=True)
            colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
            axis.errorbar(x, y, yerr=[below, above], label=task, color=colour, marker=mark, capsize=3, linewidth=1.4)
    axis.set_xticks(range(len(stages)), stages)
    axis.set_ylabel("bits per byte (lower is better)")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


def draw_positions(report: dict[str, Any]) -> Figure | None:
    """Bits per byte by position, a panel a text, a line a stage; None when it was not measured."""
    tasks = sorted({task for stage in measured(report).values() for task, found in stage["positions"].items() if found})
    if not tasks:
        return None
    picture = figure(4.2 * len(tasks) + 1.4, 3.6)
    axes = picture.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        for index, (name, stage) in enumerate(measured(report).items()):
            if stage["positions"].get(task):
                parts = stage["positions"][task]["ranges"]
                labels = [f"{part['from']}-{part['to']}" for part in parts]
                values = [part["bits_per_byte"] for part in parts]
                colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
                axis.plot(labels, values, label=name, color=colour, marker=mark, linewidth=1.4)
        axis.set_title(task)
        axis.set_xlabel("tokens of context")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("bits per byte (lower is better)")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture
