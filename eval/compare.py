"""Several runs in one page: their losses over tokens on one axis, their tables side by side.

Runs are reports that eval/evaluation.py wrote, of other sizes, recipes or bases. Everything on the page comes from their
JSON; it is one file that needs no other.

    python eval/compare.py small full --reports eval/reports        # writes eval/reports/compare.html
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from eval import pictures, report, tables, verdict
from eval.report import Section
from eval.tables import Table, bracket, measured
from prep.common import BadInput, atomic_write, run

HERE = Path(__file__).parent
LOGARITHMIC = 20  # times as many tokens in the longest run as in the shortest: the short one would be a dot

Point = tuple[float, float]


def curve(stages: dict[str, dict[str, Any]]) -> tuple[list[list[Point]], list[Point], list[str]]:
    """A run's losses over all tokens it has seen, stage after stage.

    Returns the training losses (a list of (tokens, nats a token) for each stage), the validation losses of all stages,
    and the stages whose trainer did not count tokens, which are left out. A stage starts where its log ends that stands
    before it: the tokens of a run are those of its chain.
    """
    lines: list[list[Point]] = []
    checks: list[Point] = []
    uncounted = []
    before = 0.0
    for name, stage in stages.items():
        log = stage["training"]
        if not log:
            continue
        if any(point["tokens"] is None for point in log if point["loss"] is not None):
            uncounted.append(name)
            continue
        line = []
        seen = 0.0  # validation is logged without a token count: it stands where training stood
        for point in log:
            if point["loss"] is not None:
                seen = point["tokens"]
                line.append((before + seen, point["loss"]))
            if point["eval_loss"] is not None:
                checks.append((before + seen, point["eval_loss"]))
        lines.append(line)
        before += seen
    return lines, checks, uncounted


def draw_losses(reports: Sequence[dict[str, Any]]) -> Figure | None:
    """Every run's losses on one axis, a colour a run; None when no run logged a loss with its tokens."""
    drawn = {each["run"]: curve(measured(each)) for each in reports}
    ends = [lines[-1][-1][0] for lines, _, _ in drawn.values() if lines and lines[-1]]
    if not ends:
        return None
    picture = pictures.figure(8, 4.2)
    axis = picture.subplots()
    for index, (name, (lines, checks, _)) in enumerate(drawn.items()):
        colour, mark = pictures.COLOURS[index % len(pictures.COLOURS)], pictures.MARKS[index % len(pictures.MARKS)]
        for number, line in enumerate(lines):
            axis.plot(
                *zip(*line, strict=True), color=colour, linewidth=1.4, label=None if number else f"{name}, training"
            )
        if checks:
            axis.plot(*zip(*checks, strict=True), mark, color=colour, markersize=5, label=f"{name}, validation")
    if max(ends) > LOGARITHMIC * min(ends):
        axis.set_xscale("log")
    pictures.plain(axis, tokens=True)
    axis.set_xlabel("tokens seen, all stages")
    axis.set_ylabel("loss, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


def in_order(reports: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The names of all runs' stages (or tasks), each once, in the order in which they are met."""
    return list(dict.fromkeys(name for each in reports for name in each[key]))


def beside(reports: Sequence[dict[str, Any]]) -> Table:
    """Bits per byte: a row a stage and text, a column a run."""
    rows = []
    for stage in in_order(reports, "stages"):
        for task in in_order(reports, "tasks"):
            scores = [measured(each).get(stage, {}).get("scores", {}).get(task) for each in reports]
            if any(scores):
                cells = [bracket(s["bits_per_byte"], s["interval"]["bits_per_byte"]) if s else "–" for s in scores]
                rows.append([f"{stage}, {task}", *cells])
    return ["stage, text", *(each["run"] for each in reports)], rows


def merged(reports: Sequence[dict[str, Any]], table: Callable[[dict[str, Any]], Table | None]) -> Table | None:
    """One table out of every run's: rows of the same name under each other, each followed by its run.

    None when no run has it. Runs whose columns differ have theirs brought to the names' union, with a dash.
    """
    made = {each["run"]: found for each in reports if (found := table(each)) and found[1]}
    if not made:
        return None
    first = next(iter(made.values()))[0]
    same = all(head == first for head, _ in made.values())
    heads = first if same else [first[0], *dict.fromkeys(name for head, _ in made.values() for name in head[1:])]
    rows = []
    for name in dict.fromkeys(row[0] for _, cells in made.values() for row in cells):
        for label, (head, cells) in made.items():
            for row in cells:
                if row[0] == name:
                    values = row[1:] if same else [dict(zip(head, row, strict=True)).get(key, "–") for key in heads[1:]]
                    rows.append([f"{name}: {label}", *values])
    return heads, rows


def warning(reports: Sequence[dict[str, Any]]) -> str:
    """Which texts are not the same in all runs, so that their figures do not compare; empty when all are."""
    differing = []
    for task in in_order(reports, "tasks"):
        texts = {each["tasks"][task]["text_sha256"] for each in reports if task in each["tasks"]}
        if len(texts) > 1:
            differing.append(task)
    return (
        f"Not the same text in all runs, so their figures do not compare: {', '.join(differing)}." if differing else ""
    )


def sections(reports: Sequence[dict[str, Any]], picture: bool) -> list[Section]:
    """What the page shows under the verdicts; what no run measured is left out."""
    uncounted = [f"{each['run']} {name}" for each in reports for name in curve(measured(each))[2]]
    note = f" Left out, since the trainer did not count tokens: {', '.join(uncounted)}." if uncounted else ""
    parts = [
        Section(
            "Bits per byte",
            "Lower is better. In brackets the 95 % bootstrap interval of each run.",
            None,
            beside(reports),
        ),
        Section("What each stage changed", "Paired, within its run.", None, merged(reports, tables.changes)),
        Section("Recited or written?", "As on each run's own page.", None, merged(reports, tables.recited)),
        Section("Spoiled?", "As on each run's own page.", None, merged(reports, tables.spoiled)),
        Section("Whose manner?", "As on each run's own page.", None, merged(reports, tables.manner)),
        Section("By position in the context", "Bits per byte.", None, merged(reports, tables.far_context)),
        Section(
            "Perplexity",
            "A token's compares only runs that share a tokenizer.",
            None,
            merged(reports, tables.perplexities),
        ),
    ]
    parts = [part for part in parts if part.table]
    if picture:
        text = f"Stage after stage. A token's loss compares only runs that share a tokenizer.{note}"
        parts.insert(0, Section("Loss over tokens", text, "losses"))
    return parts


def html(reports: Sequence[dict[str, Any]]) -> str:
    """The page."""
    figure = draw_losses(reports)
    drawn = pictures.svg(figure, "losses") if figure else ""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("compare.html.jinja").render(
        title=f"Runs compared: {', '.join(each['run'] for each in reports)}",
        reports=reports,
        about=report.about,
        verdicts=[
            (f"{stage}: {each['run']}", verdict.lines(each)[stage])
            for stage in in_order(reports, "stages")
            for each in reports
            if stage in each["stages"]
        ],
        thresholds=verdict.EXPLAINED,
        warning=warning(reports),
        sections=sections(reports, figure is not None),
        picture=Markup(drawn[drawn.find("<svg") :]) if drawn else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names of reports, two or more")
    parser.add_argument(
        "--reports", type=Path, default=Path("eval/reports"), help="their folder (default eval/reports)"
    )
    parser.add_argument("--out", type=Path, help="the page (default: compare.html in that folder)")
    args = parser.parse_args()
    names = list(dict.fromkeys(args.runs))
    if len(names) < 2:
        raise BadInput(f"one run ({names[0]}) compares with nothing: name two or more")
    reports = [report.load(args.reports / f"{name}.json") for name in names]
    for name, each in zip(names, reports, strict=True):
        each["run"] = name  # a report that was renamed goes by its file
    target = args.out or args.reports / "compare.html"
    with atomic_write(target) as file:
        file.write(html(reports))
    print("\n".join(filter(None, [report.markdown_table(beside(reports)), warning(reports), f"page: {target}"])))


if __name__ == "__main__":
    run(main)
