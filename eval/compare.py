"""Several runs in one page: their losses over tokens on one axis, their tables side by side.

Runs are reports of eval/evaluation.py, of other sizes, recipes or bases. The page is one file that needs no other.

    python eval/compare.py small full --reports eval/reports        # writes eval/reports/compare.html
"""

from prep.command import run

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval import intervals, logs, plots, report, tables, verdict
from eval.plots import Point
from eval.report import Section
from eval.tables import Table, bits, changed, measured
from prep.common import BadInput, run_name, write_text

LOGARITHMIC = 20  # times as many tokens in the longest run as in the shortest: on a linear axis the short one is a dot


def curve(report: dict[str, Any]) -> list[Point]:
    """A run's losses over the tokens seen, each stage from where the one it builds on ended, with a NaN between them."""
    points: list[Point] = []
    ends: dict[str, float] = {}
    for name, stage in measured(report).items():
        before = ends[name] = ends.get(stage["parent"], 0)
        if stage["training"]:
            points += [(before, math.nan, math.nan)] if points else []
            points += [(before + seen, loss, check) for seen, loss, check in logs.curve(stage["training"])]
            ends[name] = points[-1][0]
    return points


def draw_losses(reports: Sequence[dict[str, Any]]) -> Figure | None:
    """Every run's losses on one axis, a colour a run; None when no run logged a loss."""
    series = {each["run"]: points for each in reports if (points := curve(each))}
    if not series:
        return None
    figure = plots.figure(8, 4.2)
    axis = figure.subplots()
    plots.plot_losses(axis, series)
    plots.aside(axis)
    ends = [points[-1][0] for points in series.values()]
    if max(ends) > LOGARITHMIC * min(ends):
        axis.set_xscale("log")
        plots.over_tokens(axis)
    axis.set(xlabel="tokens seen, all stages", ylabel=plots.LOSS)
    return figure


def in_order(reports: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The names of all runs' stages (or tasks), each once, in order of first appearance."""
    return list(dict.fromkeys(name for each in reports for name in each[key]))


def beside(reports: Sequence[dict[str, Any]]) -> Table:
    """Bits per byte: a row a stage and text, a column a run."""
    rows = []
    for stage in in_order(reports, "stages"):
        for task in in_order(reports, "tasks"):
            cells = [bits(each["stages"].get(stage), task) for each in reports]
            if set(cells) != {"–"}:
                rows.append([f"{stage}, {task}", *cells])
    return ["stage, text", *(each["run"] for each in reports)], rows


def paired(reports: Sequence[dict[str, Any]]) -> Table:
    """Each run less the first, on the same text and questions; a row a stage and run."""
    first, tasks, rows = reports[0], in_order(reports, "tasks"), []
    asked = tables.ANSWERED if first.get("questions") else {}
    for name, before in measured(first).items():
        for each in reports[1:]:
            after = measured(each).get(name)
            texts = {task: told["text_sha256"] for task, told in each["tasks"].items()}
            same = [task for task, told in first["tasks"].items() if after and told["text_sha256"] == texts.get(task)]
            sides = [{task: stage["scores"][task]["documents"] for task in same} for stage in (before, after) if stage]
            cells = [changed(intervals.difference(*(side[t] for side in sides)) if t in same else None) for t in tasks]
            if asked:
                cells += tables.answered(after if each.get("questions") == first["questions"] else None, before)
            if set(cells) != {"–"}:
                rows.append([f"{name}: {each['run']} - {first['run']}", *cells])
    return ["stage", *tasks, *asked.values()], rows


def merged(reports: Sequence[dict[str, Any]], table: Callable[[dict[str, Any]], Table]) -> Table:
    """One table of all runs: rows of one name under each other, each with its run's name.

    Columns that only some runs have get a dash in the others.
    """
    made = {each["run"]: found for each in reports if (found := table(each))[1]}
    head = list(dict.fromkeys(name for own, _ in made.values() for name in own))
    names = dict.fromkeys(row[0] for _, cells in made.values() for row in cells)
    rows = [
        [f"{name}: {label}", *(dict(zip(own, row, strict=True)).get(key, "–") for key in head[1:])]
        for name in names
        for label, (own, cells) in made.items()
        for row in cells
        if row[0] == name
    ]
    return head, rows


def warning(reports: Sequence[dict[str, Any]]) -> str:
    """Which texts are not the same in all runs, so that their figures do not compare; empty when all are."""
    differing = [
        task
        for task in in_order(reports, "tasks")
        if len({each["tasks"][task]["text_sha256"] for each in reports if task in each["tasks"]}) > 1
    ]
    return (
        f"Not the same text in all runs, so their figures do not compare: {', '.join(differing)}." if differing else ""
    )


def sections(reports: Sequence[dict[str, Any]]) -> list[Section]:
    """The page under the verdicts; what no run measured is left out."""
    same = "As on each run's own page."
    return [
        Section("Loss over tokens", "Stage after stage; token losses compare only with a shared tokenizer.", "loss"),
        Section("Bits per byte", "Lower is better. In brackets the 95 % bootstrap interval.", table=beside(reports)),
        Section("What each stage changed", "Paired, within its run.", table=merged(reports, tables.changes)),
        Section("Run less run", "Paired, on the same text and the same questions.", table=paired(reports)),
        Section("Questions", same, table=merged(reports, tables.questions)),
        Section("lm-eval's tasks", same, table=merged(reports, tables.benchmarks)),
        Section("Memorisation", same, table=merged(reports, tables.memorisation)),
        Section("Degeneration", same, table=merged(reports, tables.degeneration)),
        Section("Style", same, table=merged(reports, tables.style)),
        Section("By position in the context", "Bits per byte.", table=merged(reports, tables.far_context)),
        Section(
            "Perplexity",
            "Token perplexity compares only runs that share a tokenizer.",
            table=merged(reports, tables.perplexities),
        ),
    ]


def answers(reports: Sequence[dict[str, Any]]) -> list[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Each question with the answers of every run's stages, as the page needs them."""
    asked: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in reports:
        names = {question["name"] for question in each.get("questions", ())}
        for prompt, written in report.samples_by_prompt(each):
            if prompt["name"] in names:
                labelled = [answer | {"label": f"{each['run']}: {answer['label']}"} for answer in written]
                asked.setdefault((prompt["name"], prompt["text"]), []).extend(map(report.marked, labelled))
    return [({"name": name, "text": text}, written) for (name, text), written in asked.items()]


def html(reports: Sequence[dict[str, Any]]) -> str:
    """The page."""
    figure = draw_losses(reports)
    return report.render(
        sections(reports),
        {"loss": plots.svg(figure, "losses")} if figure else {},
        title=f"Runs compared: {', '.join(each['run'] for each in reports)}",
        about=[(each["run"], report.about(each)) for each in reports],
        verdicts=[
            (f"{stage}: {each['run']}", verdict.lines(each)[stage])
            for stage in in_order(reports, "stages")
            for each in reports
            if stage in each["stages"]
        ],
        warning=warning(reports),
        decoding="Questions are answered greedily, in each base's own chat template.",
        prompts=answers(reports),
        versions="",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=run_name, nargs="+", metavar="RUN", help="names of reports, two or more")
    parser.add_argument(
        "--reports", type=Path, default=Path("eval/reports"), help="their folder (default eval/reports)"
    )
    parser.add_argument("--out", type=Path, help="the page (default: compare.html in that folder)")
    args = parser.parse_args()
    names = list(dict.fromkeys(args.runs))
    if len(names) < 2:
        raise BadInput(f"only one run ({names[0]}) to compare: name two or more")
    reports = [report.load(args.reports / f"{name}.json") for name in names]
    target = args.out or args.reports / "compare.html"
    write_text(target, html(reports))
    print("\n".join(filter(None, [tables.markdown(beside(reports)), warning(reports), f"page: {target}"])))


if __name__ == "__main__":
    run(main)
