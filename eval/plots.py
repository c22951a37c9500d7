"""The plots of the reports, the comparison and the workbench.

figure = plots.draw_bits(report)
text = plots.svg(figure, "demo.bpb.svg")
"""

import io
import json
import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from eval import logs
from eval.metrics import EXTRACTABLE
from eval.tables import measured

Point = tuple[float, float | None, float | None]  # tokens, training loss, validation loss
LOSS = "loss, nats per token"
# Okabe & Ito's colours, told apart by every kind of eye; enough for as many tasks as there are.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def figure(width: float, height: float) -> Figure:
    """An empty picture, drawn without a display."""
    return Figure(figsize=(width, height), layout="constrained")


def over_tokens(axis: Axes) -> None:
    """Thousands of tokens as 20k."""
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def svg(picture: Figure, name: str) -> str:
    """The picture as SVG, whose text depends on nothing but what is drawn and its name."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        picture.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def look(index: int) -> dict[str, Any]:
    """Colour and mark of the series with this number."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)], "linewidth": 1.4}


def aside(axis: Axes) -> None:
    """The legend to the right of the axis."""
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def plot_losses(axis: Axes, series: dict[str, list[Point]]) -> None:
    """Loss curves on one axis, a colour a name: training solid, validation dashed with marks.

    A NaN breaks a line. A single series may have the name "": it needs no name in the legend, and gets a colour a kind.
    """
    kinds = ("training", "validation")
    both = all(any(point[column] is not None for each in series.values() for point in each) for column in (1, 2))
    for index, (name, each) in enumerate(series.items()):
        for column, kind in enumerate(kinds, 1):
            line = [(point[0], point[column]) for point in each if point[column] is not None]
            if line:
                style = look(index) if name or column == 1 else look(1) | {"marker": MARKS[index]}
                label = ", ".join(part for part in (name, kind if both or not name else "") if part)
                label = label.replace("$", r"\$")  # matplotlib sets what is between two of them as a formula
                if column == 1:
                    style["marker"] = None
                dashes = "--" if both and column == 2 else "-"
                axis.plot(*zip(*line, strict=True), label=label, linestyle=dashes, markersize=4, **style)
    over_tokens(axis)
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.3)


def draw_losses(report: dict[str, Any]) -> Figure | None:
    """Training and validation loss of every stage that left a log, side by side; None when none did.

    Stages that were trained on the same rows share an axis.
    """
    trained = {name: stage for name, stage in measured(report).items() if stage["training"]}
    if not trained:
        return None
    shared: dict[str, list[str]] = {}
    for name, stage in trained.items():
        rows = json.dumps(stage["gate"]["data"], sort_keys=True) if stage["gate"] else name
        shared.setdefault(rows, []).append(name)
    picture = figure(3.6 * len(shared) + 0.6, 3.2)
    axes = picture.subplots(1, len(shared), squeeze=False, sharey=True)[0]
    for axis, names in zip(axes, shared.values(), strict=True):
        plot_losses(axis, {"" if len(names) == 1 else name: logs.curve(trained[name]["training"]) for name in names})
        axis.set_title(", ".join(names))
        if axis.lines:
            axis.legend(frameon=False)
    axes[0].set_ylabel(LOSS)
    return picture


def draw_runs(runs: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Trainings while they run, {name: log}: their losses on one axis, their learning rates below; None without any."""
    runs = {name: log for name, log in runs.items() if any(point["loss"] is not None for point in log)}
    if not runs:
        return None
    picture = figure(9.2, 4.6)
    upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    plot_losses(upper, {name: logs.curve(log) for name, log in runs.items()})
    aside(upper)
    for index, log in enumerate(runs.values()):
        rates = [(point["tokens"], point["learning_rate"]) for point in log if point["learning_rate"] is not None]
        lower.plot(*zip(*rates, strict=True), **look(index) | {"marker": None})
    over_tokens(lower)
    upper.set(xlabel="", ylabel=LOSS)
    lower.set(xlabel="tokens", ylabel="learning rate")
    lower.set_ylim(bottom=0)
    lower.grid(alpha=0.3)
    return picture


def draw_bits(report: dict[str, Any]) -> Figure:
    """Bits per byte by stage, a line a text, with 95 % intervals."""
    stages = list(measured(report))
    picture = figure(7.2, 4.2)
    axis = picture.subplots()
    for index, task in enumerate(report["tasks"]):
        points = []
        for place, name in enumerate(stages):
            if score := report["stages"][name]["scores"].get(task):
                value = score["bits_per_byte"]
                low, high = score["interval"]["bits_per_byte"] or (value, value)
                # The intervals of one stage would hide each other on one vertical line.
                x = place + 0.05 * (index - (len(report["tasks"]) - 1) / 2)
                points.append((x, value, value - low, high - value))
        if points:
            places, y, below, above = zip(*points, strict=True)
            axis.errorbar(places, y, yerr=[below, above], label=task, capsize=3, **look(index))
    axis.set_xticks(range(len(stages)), stages)
    axis.set_ylabel("bits per byte (lower is better)")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # seen on a phone too
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
                axis.plot(labels, values, label=name, **look(index))
        axis.set_title(task)
        axis.set_xlabel("tokens of context")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("bits per byte (lower is better)")
    aside(axes[-1])
    return picture


def scatter(axis: Axes, centre: float, width: float, values: list[float], index: int, **more: Any) -> None:
    """Values as points in a column, spread in their order so that they do not hide each other."""
    x = [centre + width * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
    axis.plot(x, values, linestyle="", color=COLOURS[index], alpha=0.6, **more)


def draw_memory(report: dict[str, Any]) -> Figure | None:
    """Left, how probable the novel's chunks of 50 tokens are to each stage, trained beside held out; right, the longest
    sequence of the novel's words in each sample, and in the author's own held-out pages. None when neither was measured."""
    stages = {name: stage for name, stage in measured(report).items() if not stage["form"]}

    def spans(stage: dict[str, Any], task: str) -> list[float]:
        documents = stage["scores"][task]["documents"] if stage["scores"].get(task) else []
        return [span / math.log(10) for document in documents for span in document["spans"]]

    copies = {name: [s["copied"]["words"] for s in stage["samples"] if s["copied"]] for name, stage in stages.items()}
    copies["author"] = (report["reference"] or {"copied": []})["copied"]
    copies = {name: values for name, values in copies.items() if values}
    tasks = {"novel_train": "trained", "novel_heldout": "held out"}
    panels = [any(spans(stage, task) for stage in stages.values() for task in tasks), bool(copies)]
    if not any(panels):
        return None
    picture = figure(4.6 * sum(panels) + 0.8, 3.6)
    axes = list(picture.subplots(1, sum(panels), squeeze=False)[0])
    if panels[0]:
        axis = axes.pop(0)
        for index, (task, label) in enumerate(tasks.items()):
            for place, stage in enumerate(stages.values()):
                style = {"marker": MARKS[index], "markersize": 3, "label": None if place else label}
                scatter(axis, place + (index - 0.5) * 0.4, 0.24, spans(stage, task), index, **style)
        axis.axhline(math.log10(EXTRACTABLE), color="0.4", linestyle="--", linewidth=1)
        axis.text(len(stages) - 0.5, math.log10(EXTRACTABLE), "extractable above", ha="right", va="bottom", fontsize=8)
        axis.set_ylim(top=1)
        axis.set_xticks(range(len(stages)), list(stages))
        axis.set_ylabel("log10 of a 50-token chunk's probability")
        axis.legend(frameon=False, loc="lower right", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    if panels[1]:
        axis = axes.pop(0)
        for place, values in enumerate(copies.values()):
            scatter(axis, place, 0.5, values, 2, marker="o", markersize=4)
        axis.set_ylim(bottom=-0.5)
        axis.set_xticks(range(len(copies)), list(copies))
        axis.set_ylabel("longest run of copied words, a sample")
        axis.grid(axis="y", alpha=0.3)
    return picture
