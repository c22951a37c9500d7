"""The tables of a report: a head, and rows whose first cell is a name and whose others are figures; no rows where nothing
was measured.

print(tables.markdown(tables.overview(report)))
"""

import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from eval import intervals

Table = tuple[list[str], list[list[str]]]


def markdown(table: Table) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    head, rows = table
    aligned = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, head, tablefmt="pipe", disable_numparse=True, colalign=aligned)


def measured(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that were measured, in the chain's order."""
    return {name: stage for name, stage in report["stages"].items() if stage}


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share."""
    return "–" if value is None else f"{value:.{digits}%}"


def bracket(value: float, limits: Sequence[float] | None, sign: str = "") -> str:
    """A figure with its interval: 1.234 [1.2, 1.3]."""
    return f"{value:{sign}.3f}" + (f" [{limits[0]:{sign}.3f}, {limits[1]:{sign}.3f}]" if limits else "")


def bits(stage: dict[str, Any] | None, task: str) -> str:
    """A stage's bits per byte on a text, with the interval."""
    score = stage["scores"].get(task) if stage else None
    return bracket(score["bits_per_byte"], score["interval"]["bits_per_byte"]) if score else "–"


def changed(difference: dict[str, Any] | None, star: str = " *") -> str:
    """A paired difference with its interval, a star where that leaves out zero; a dash for what was not measured."""
    if difference is None:
        return "–"
    interval = difference["interval"]
    sure = interval and interval[0] * interval[1] > 0
    return bracket(difference["bits_per_byte"], interval, "+") + (star if sure else "")


ANSWERED = {"right": "right", "own_language": "in the questions' language", "ended": "stops by itself"}


def answered(after: dict[str, Any] | None, before: dict[str, Any] | None) -> list[str]:
    """Paired differences of the shares of ANSWERED, with intervals and stars; dashes unless both answered the questions."""
    sides = [(stage or {}).get("answers") or [] for stage in (before, after)]
    sides = sides if all(sides) else [[], []]
    cells = []
    for key in ANSWERED:
        found = intervals.difference_of_means(*([answer[key] for answer in side] for side in sides))
        sure = " *" if found and found[1][0] * found[1][1] > 0 else ""
        cells.append("{:+.0%} [{:+.0%}, {:+.0%}]".format(found[0], *found[1]) + sure if found else "–")
    return cells


def passed(stage: dict[str, Any] | None) -> str:
    """The gate's result for the weights that were measured."""
    if stage is None or stage["recipe"] is None:
        return "–"
    if stage["gate"] is None:
        return "not checked"
    return "passed" if stage["gate"]["passed"] else "other weights"


def overview(report: dict[str, Any]) -> Table:
    """Bits per byte of every stage on every text, with intervals, and its gate."""
    tasks = list(report["tasks"])
    rows = [[name, *(bits(stage, task) for task in tasks), passed(stage)] for name, stage in report["stages"].items()]
    return ["bits per byte", *tasks, "training"], rows


def changes(report: dict[str, Any]) -> Table:
    """Each stage against the one it builds on, adapters also against their full model, and an ablation; a star where the
    interval excludes 0."""
    tasks, stages = list(report["tasks"]), report["stages"]
    asked = ANSWERED if any(stage.get("answers") for stage in measured(report).values()) else {}
    rows = []
    for name, difference in report["differences"].items():
        label = name if " - " in name else f"{name} - {difference['against']}"
        sides = (stages[label.removesuffix(f" - {difference['against']}")], stages[difference["against"]])
        cells = [changed(difference["scores"].get(task)) for task in tasks]
        rows.append([label, *cells, *(answered(*sides) if asked else [])])
    return ["change", *tasks, *asked.values()], rows


def perplexities(report: dict[str, Any]) -> Table:
    """All figures of all texts, a row a stage and text."""
    rows = [
        [
            f"{name}, {task}",
            *(number(score[f"{unit}_perplexity"], 2) for unit in ("token", "word", "byte")),
            *(f"{score[key]:,}" for key in ("tokens", "words", "bytes")),
        ]
        for name, stage in measured(report).items()
        for task, score in stage["scores"].items()
        if score
    ]
    return ["stage, text", "per token", "per word", "per byte", "tokens", "words", "bytes"], rows


def far_context(report: dict[str, Any]) -> Table:
    """Bits per byte of the same chunks by position, a row a stage and text."""
    ranges, rows = [], []
    for name, stage in measured(report).items():
        for task, result in stage["positions"].items():
            if result:
                ranges = [f"{part['from']}-{part['to']}" for part in result["ranges"]]
                bits = [number(part["bits_per_byte"]) for part in result["ranges"]]
                rows.append([f"{name}, {task}", *bits, changed(result["change"], star="")])
    return ["stage, text", *ranges, "last - second"], rows


def degeneration(report: dict[str, Any]) -> Table:
    """Repetition, loops, early ends, words that are not French and debris, in samples and in the author's own pages."""
    sides = {name: stage["degeneration"] for name, stage in measured(report).items() if stage["degeneration"]}
    if report["reference"]:
        sides["the novel itself"] = report["reference"]["degeneration"] | {"ended_early": None}
    rows = [
        [
            name,
            percent(side["rep_4"], 1),
            number(side["distinct_2"], 2),
            *(percent(side[key]) for key in ("looping", "ended_early", "not_french")),
            number(side["artefacts"], 2),
        ]
        for name, side in sides.items()
    ]
    return ["samples of", "rep-4", "distinct-2", "loop", "ended early", "not French", "debris per sample"], rows


def style(report: dict[str, Any]) -> Table:
    """Delta, dialogue, sentences and names of samples and books."""
    rows = []
    for name, side in (report.get("style") or {}).items():
        delta = [number((side["delta"] or {}).get(key), 2) for key in ("novel", "gallica", "base")]
        sentence = "{1:.0f} [{0:.0f}, {2:.0f}]".format(*side["sentence_words"]) if side["sentence_words"] else "–"
        rows.append([name, f"{side['words']:,}", *delta, percent(side["dialogue"]), sentence, number(side["names"], 1)])
    head = "text|words|Delta to the novel|to Gallica|to the base|dialogue|words per sentence|names"
    return head.split("|"), rows


def memorisation(report: dict[str, Any]) -> Table:
    """Probability of the novel's trained and held-out text, and the longest copies in samples."""

    def copied(words: list[int]) -> list[str]:
        return [number(statistics.median(words) if words else None, 1), number(max(words, default=None), 0)]

    rows = []
    for name, stage in measured(report).items():
        copies = [sample["copied"]["words"] for sample in stage["samples"] if sample["copied"]]
        memory = stage["memorisation"]
        if not stage["form"] and (memory or copies):
            sides = [memory[side] if memory else {} for side in ("train", "heldout")]
            probable = [number(side.get("token_probability")) for side in sides]
            rows.append([name, *probable, *(percent(side.get("extractable"), 1) for side in sides), *copied(copies)])
    if rows and report["reference"] and report["reference"]["copied"]:
        rows.append(["the novel itself", *["–"] * 4, *copied(report["reference"]["copied"])])
    head = "stage|p(token), trained|p(token), held out|extractable, trained|extractable, held out|copied words, median|longest"
    return head.split("|"), rows


def questions(report: dict[str, Any]) -> Table:
    """The share of answers that are right, in the questions' language, ended, and without the template."""
    rows = []
    for name, stage in measured(report).items():
        if answers := stage.get("answers"):
            cells = []
            for key in (*ANSWERED, "template"):
                known = [answer[key] for answer in answers if answer[key] is not None]
                cells.append(f"{percent(sum(known) / len(known))} of {len(known)}" if known else "–")
            rows.append([name, *cells, f"{sum(answer['tokens'] for answer in answers) / len(answers):.0f}"])
    return ["answers of", *ANSWERED.values(), "repeats the template", "tokens"], rows


def benchmarks(report: dict[str, Any]) -> Table:
    """lm-eval's own tasks: a row a stage, a column a task and metric."""
    found = {name: stage["benchmarks"] for name, stage in measured(report).items() if stage.get("benchmarks")}
    head = list(dict.fromkeys(figure for figures in found.values() for figure in figures))
    rows = [
        [name, *(f"{number(figures[key]['value'])} ± {number(figures[key]['stderr'])}" for key in head)]
        for name, figures in found.items()
    ]
    return ["task, metric", *head], rows


def reading(report: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the blind reading; None when nobody has read."""
    return (report.get("reading") or {}).get("figures")


def readers(report: dict[str, Any]) -> str:
    """How many read, and whether they agree."""
    figures = reading(report)
    if not figures:
        return ""
    said = f"Readers: {len(figures['readers'])}."
    if same := figures["agreement"]:
        kappa = f"Cohen's kappa {number(same['kappa'], 2)}"
        said += f" Two chose the same side in {percent(same['same'] / same['of'])} of {same['of']} cases, {kappa}."
    return said


def taken(report: dict[str, Any]) -> Table:
    """How often each stage was taken for the author, and the controls."""
    shares = {}
    if figures := reading(report):
        shares = {f"{name} taken for the author": share for name, share in figures["stages"].items()}
        shares["control, both the author's: the true continuation"] = figures["author"]
        shares["control, both one stage's: the left one"] = figures["same"]
        shares["all pairs: the left one"] = figures["left"]
    rows = []
    for name, share in shares.items():
        if count := share["answers"]:
            low, high = share["interval"]
            star = "" if low <= 0.5 <= high else " *"
            interval = f"{percent(share['taken'] / count)} [{percent(low)}, {percent(high)}]{star}"
            rows.append([name, f"{share['taken']} of {count}", interval, percent(share["sure"] / count)])
    return ["chosen", "answers", "share", "sure"], rows


def preferred(report: dict[str, Any]) -> Table:
    """Stage against stage."""
    figures = reading(report) or {"preferred": None}
    rows = [
        [name, f"{side['won']} of {side['answers']}", bracket(side["strength"], side["interval"], "+")]
        for name, side in (figures["preferred"] or {}).items()
    ]
    return ["stage", "preferred", "strength"], rows


def texts(report: dict[str, Any]) -> Table:
    """What each task scored."""
    rows = [
        [name, str(task["documents"]), task["path"] or "Python's standard library", task["text_sha256"][:16]]
        for name, task in report["tasks"].items()
    ]
    return ["text", "documents", "file", "sha256 of the texts"], rows


def files(report: dict[str, Any]) -> Table:
    """Which weights each stage is, and the seconds it took."""
    rows = [
        [name, path, value[:16], *(number(stage["seconds"][key], 1) for key in ("scoring", "positions", "sampling"))]
        for name, stage in measured(report).items()
        for path, value in stage["weights"].items()
        if path.endswith(".safetensors")
    ]
    return ["stage", "weights", "sha256", "scoring, s", "positions, s", "sampling, s"], rows
