"""Turn the evidence of a run into a page: tables, loss curves, bits per byte by stage, samples.

Everything on the page comes from the one JSON file; the same file gives the same bytes, pictures included.

    python eval/report.py eval/reports/demo.json       # writes demo.md and its pictures beside it
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import matplotlib
from matplotlib.figure import Figure

from prep.files import BadInput, atomic_write, run

SCHEMA = Path(__file__).parent / "report.schema.json"
# Okabe & Ito's colours, told apart by every kind of eye; enough for as many tasks as there are.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def check(report: Any, path: Path) -> None:
    """Raises BadInput when the report is not what the schema describes, naming the first wrong place."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(report))
    if error:
        where = ".".join(map(str, error.absolute_path)) or "the whole"
        raise BadInput(f"{path} is not a report of this version: {where}: {error.message[:200]}")


def load(path: Path) -> dict[str, Any]:
    """Read and check a report. Raises BadInput when it is missing, torn or does not follow the schema."""
    if not path.is_file():
        raise BadInput(f"no report {path}: eval/evaluation.py writes it")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not whole JSON ({error}); run the evaluation again") from error
    check(report, path)
    return report


def measured(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that were measured, in the chain's order."""
    return {name: stage for name, stage in report["stages"].items() if stage}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal; the first is text, the others are figures."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(("-" * (width + 2)) if i == 0 else ("-" * (width + 1) + ":") for i, width in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def bracket(value: float | None, limits: Sequence[float] | None, sign: str = "") -> str:
    """A figure with its interval: 1.234 [1.2, 1.3]."""
    if value is None:
        return "–"
    return f"{value:{sign}.3f}" + (f" [{limits[0]:{sign}.3f}, {limits[1]:{sign}.3f}]" if limits else "")


def passed(stage: dict[str, Any] | None) -> str:
    """What the gate says of a stage's training."""
    if stage is None or stage["recipe"] is None:
        return "–"
    if stage["gate"] is None:
        return "not checked"
    return "passed" if stage["gate"]["passed"] else "other weights"


def overview(report: dict[str, Any]) -> str:
    """The table of the terminal: bits per byte of every stage on every text, with intervals, and its gate."""
    tasks = list(report["tasks"])
    rows = []
    for name, stage in report["stages"].items():
        scores = stage["scores"] if stage else {}
        cells = []
        for task in tasks:
            score = scores.get(task)
            cells.append(bracket(score["bits_per_byte"], score["interval"]["bits_per_byte"]) if score else "–")
        rows.append([name, *cells, passed(stage)])
    return table(["bits per byte", *tasks, "training"], rows)


def changes(report: dict[str, Any]) -> str:
    """Each stage against the one it builds on, on the same text; bold where the interval leaves out zero."""
    tasks = list(report["tasks"])
    rows = []
    for name, difference in report["differences"].items():
        cells = []
        for task in tasks:
            change = difference["scores"].get(task)
            text = bracket(change["bits_per_byte"], change["interval"], "+") if change else "–"
            sure = change and change["interval"] and change["interval"][0] * change["interval"][1] > 0
            cells.append(f"**{text}**" if sure else text)
        rows.append([f"{name} less {difference['against']}", *cells])
    return table(["change", *tasks], rows)


def perplexities(report: dict[str, Any]) -> str:
    """All figures of all texts, a row a stage and text."""
    rows = []
    for name, stage in measured(report).items():
        for task, score in stage["scores"].items():
            if score:
                rows.append(
                    [
                        f"{name}, {task}",
                        *(number(score[f"{unit}_perplexity"], 2) for unit in ("token", "word", "byte")),
                        *(f"{score[key]:,}" for key in ("tokens", "words", "bytes")),
                    ]
                )
    return table(["stage, text", "a token", "a word", "a byte", "tokens", "words", "bytes"], rows)


def far_context(report: dict[str, Any]) -> str | None:
    """Bits per byte of the same pieces by position, a row a stage and text; None when it was not measured."""
    rows = []
    ranges: list[str] = []
    for name, stage in measured(report).items():
        for task, result in stage["positions"].items():
            if result:
                ranges = [f"{part['from']}-{part['to']}" for part in result["ranges"]]
                cells = [number(part["bits_per_byte"]) for part in result["ranges"]]
                change = result["change"]
                gain = bracket(change["bits_per_byte"], change["interval"], "+") if change else "–"
                rows.append([f"{name}, {task}", *cells, gain])
    return table(["stage, text", *ranges, "last less second"], rows) if rows else None


def percent(value: float | None, digits: int = 0) -> str:
    """A share."""
    return "–" if value is None else f"{value:.{digits}%}"


def spoiled(report: dict[str, Any]) -> str:
    """Repetition, loops, early ends, foreign words and page noise in each stage's samples, and in the author's pages."""
    sides = {name: stage["degeneration"] for name, stage in measured(report).items()}
    if report["reference"]:
        sides["the novel itself"] = report["reference"]["degeneration"]
    rows = [
        [
            name,
            percent(side["rep_4"], 1),
            number(side["distinct_2"], 2),
            percent(side["looping"]),
            percent(side["ended_early"]) if name in report["stages"] else "–",
            percent(side["not_french"]),
            number(side["artefacts"], 2),
        ]
        for name, side in sides.items()
    ]
    head = ["samples of", "rep-4", "distinct-2", "loop", "ended early", "not French", "page noise a sample"]
    return table(head, rows)


def recited(report: dict[str, Any]) -> str | None:
    """Probability of the novel's true text, trained and held out, and the longest copies in samples; None if unmeasured."""
    rows = []
    for name, stage in measured(report).items():
        copies = [sample["copied"]["words"] for sample in stage["samples"] if sample["copied"]]
        memory = stage["memorisation"]
        if memory or copies:
            sides = [memory[side] if memory else None for side in ("train", "heldout")]
            rows.append(
                [
                    name,
                    *(number(side["token_probability"] if side else None) for side in sides),
                    *(percent(side["extractable"] if side else None, 1) for side in sides),
                    number(statistics.median(copies) if copies else None, 1),
                    number(max(copies, default=None), 0),
                ]
            )
    if not rows:
        return None
    if report["reference"] and report["reference"]["copied"]:
        copies = report["reference"]["copied"]
        rows.append(["the novel itself", *["–"] * 4, number(statistics.median(copies), 1), number(max(copies), 0)])
    head = [
        "stage",
        "p token, trained",
        "held out",
        "extractable, trained",
        "held out",
        "copied words, median",
        "longest",
    ]
    return table(head, rows)


def figure(width: float, height: float) -> Figure:
    """An empty picture, drawn without a display."""
    return Figure(figsize=(width, height), layout="constrained")


def save(picture: Figure, path: Path) -> None:
    """Write an SVG whose bytes depend on nothing but what is drawn."""
    with matplotlib.rc_context({"svg.hashsalt": path.name}), atomic_write(path, "wb") as file:
        picture.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


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


def quoted(text: str) -> str:
    """A text as a Markdown quotation, its own signs kept from being read as Markdown."""
    for sign in "\\`*_<>#[]|":
        text = text.replace(sign, "\\" + sign)
    return "\n".join(f"> {line}".rstrip() for line in text.strip("\n").split("\n"))


def sample_pages(report: dict[str, Any]) -> list[str]:
    """For each prompt, what every stage wrote after it, one under the other."""
    parts = []
    for prompt in report["prompts"]:
        parts += [f"### {prompt['name']}", "The prompt:", quoted(prompt["text"])]
        for name, stage in measured(report).items():
            for sample in stage["samples"]:
                if sample["prompt"] == prompt["name"]:
                    end = ", ended by the model" if sample["ended"] else ""
                    parts += [
                        f"**{name}**, seed {sample['seed']}, no. {sample['index'] + 1}, {sample['tokens']} tokens{end}:",
                        quoted(sample["text"]) if sample["text"].strip() else "> (nothing)",
                    ]
    return parts


def page(report: dict[str, Any], pictures: dict[str, str]) -> str:
    """The Markdown page; `pictures` has the file names of those that were drawn."""
    where, arguments = report["environment"], report["arguments"]
    missing = [name for name, stage in report["stages"].items() if stage is None]
    git = where["git"]
    commit = f"commit {git['commit'][:12]}{' with changes' if git['modified'] else ''}" if git else "no git commit"
    decoding = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in arguments["decoding"].items())
    units = {
        task: f"{score['interval']['units']} {score['interval']['unit']}s"
        for stage in measured(report).values()
        for task, score in stage["scores"].items()
        if score
    }
    parts = [
        f"# Evaluation: {report['run']}",
        f"{report['date'][:10]}, {commit}, {where['cpu']}, device {where['device']}, {where['dtype']}. "
        "Generated from the JSON of the same name; what the figures mean stands in eval/README.md."
        + (f" Not measured: {', '.join(missing)}." if missing else ""),
        "## Bits per byte",
        "Lower is better. In brackets the 95 % bootstrap interval, over "
        + ", ".join(f"{count} ({task})" for task, count in units.items())
        + ". Adapters stand on their base unquantised.",
        overview(report),
        f"![Bits per byte by stage]({pictures['bpb']})",
    ]
    if report["differences"]:
        parts += [
            "## What each stage changed",
            "The difference on the same text, in bits per byte, with its paired 95 % interval; bold where that leaves out zero.",
            changes(report),
        ]
    if "loss" in pictures:
        parts += ["## Loss", f"![Training and validation loss of each stage]({pictures['loss']})"]
    positions = far_context(report)
    if positions:
        parts += [
            "## By position in the context",
            "The same pieces of text in bits per byte, with so many tokens before them; lower on the right means that far "
            "context is used. The last column is the paired difference, with its 95 % interval.",
            positions,
            f"![Bits per byte by position]({pictures['position']})",
        ]
    parts += [
        "## Perplexity",
        "Of a token, a word, a byte. Token perplexity compares only models that share a tokenizer.",
        perplexities(report),
        *(
            [
                "## Recited or written?",
                "The typical probability of a true token, and the share of 50-token passages that one draw in a thousand "
                "would give word by word: for pages the last stage was trained on, and for pages held out. Then the longest "
                "run of words in each sample that stands in the training text, beside what the author's held-out pages share "
                "with the rest of the book.",
                recited_table,
            ]
            if (recited_table := recited(report))
            else []
        ),
        "## Spoiled?",
        "Repeated 4-grams within a sample, different 2-grams over all, samples that loop, that stop by themselves, words that "
        "are not French (proper names count), lines like page numbers or running headers. The novel's own held-out pages, "
        "cut to a sample's length, say what is normal.",
        spoiled(report),
        "## Samples",
        f"Same prompts, seed and decoding for every stage: {decoding}.",
        *sample_pages(report),
        "## What was measured",
        table(
            ["text", "documents", "file", "sha256 of the texts"],
            [
                [name, str(task["documents"]), task["path"] or "Python's standard library", task["text_sha256"][:16]]
                for name, task in report["tasks"].items()
            ],
        ),
        table(
            ["stage", "weights", "sha256", "scoring, s", "sampling, s"],
            [
                [
                    name,
                    path,
                    value[:16],
                    number(stage["seconds"]["scoring"], 1),
                    number(stage["seconds"]["sampling"], 1),
                ]
                for name, stage in measured(report).items()
                for path, value in stage["weights"].items()
                if path.endswith(".safetensors")
            ],
        ),
        ", ".join(f"{name} {version}" for name, version in where["versions"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write the page and its pictures into `folder`; returns the page's path."""
    drawn = {"bpb": draw_bits(report), "loss": draw_losses(report), "position": draw_positions(report)}
    pictures = {}
    for kind, picture in drawn.items():
        if picture:
            pictures[kind] = f"{report['run']}.{kind}.svg"
            save(picture, folder / pictures[kind])
    target = folder / f"{report['run']}.md"
    with atomic_write(target) as file:
        file.write(page(report, pictures))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the JSON that eval/evaluation.py wrote")
    args = parser.parse_args()
    report = load(args.report)
    print(overview(report))
    print(f"report: {write(report, args.report.parent)}")


if __name__ == "__main__":
    run(main)
