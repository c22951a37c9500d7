"""The page and the picture of a sweep, made from bench/reports/train.json (or another plan's) and nothing else.

    python bench/sweep_report.py bench/reports/train.json

Figures are means over seeds; intervals are 95 % over held-out works, paired on the same text.
"""

from prep.command import run

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from eval import intervals, plots
from eval.tables import changed, markdown, number
from prep.common import commit, read_json, write_text

BASE = "base"
TEXTS = {"gallica_heldout": "Gallica", "novel_heldout": "novel"}  # of a plan that names none
PAGE = """# Which settings learn

Bits per byte on text that no variant was trained on; less is better. Means over seeds; in brackets the 95 %
interval over works, or blocks where a text has few, paired on the same text; * where it leaves out zero. A dash means
not measured.{kafka}
Made by `make bench-{name}` from bench/{name}.yml.

{cpu}, {threads} cores, no GPU; each run uses {plan[threads]}. Tokens of one pass: {trained}. Scored tokens: {scored}.
Every recipe's tokens per step are divided: {divisors}. From one seed to the other, a difference in these tables changed
by at most {spread}. The base before any training: {base}.

{stages}
{more}## What each variant is

{variants}
For every variant: `{plan[all]}`, profile `{plan[profile]}`.

{picture}{date}, {commit}.
"""
KAFKA = " `kafka` stands for the settings of [Almarch/kafka](../kafka), the project that this one continues."
MOVEMENT = """## Movement of the weights in full fine-tuning

Median over the matrices, measured in the precision of the trained weights.

"""
MEMORISATION = """## Memorisation

Token probability: geometric mean over spans of 50 tokens with at least 200 tokens of true text before them.

"""
DEGENERATION = """## Degeneration

What each writes after places of the novel's held-out pages: means over places and seeds, with the difference from what it started
from and its 95 % interval over places; above, the author's own words there. Looping: share of draws. Repeated: share of 4-grams. Not
French: share of words. Copied: the longest run of words that is in the training text too.

"""


def dumped(report: dict[str, Any]) -> str:
    """The report as JSON with one line per run and variant, so that a diff shows what was measured again."""

    def lines(value: Any, indent: str, depth: int) -> str:
        if not depth or not isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        inner = (f'{indent} "{key}": {lines(each, indent + " ", depth - 1)}' for key, each in value.items())
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"

    return lines(report, "", 2) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; nothing without rows."""
    return markdown((head, rows)) + "\n" if rows else ""


class Sweep:
    """A report and the figures that follow from it."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        self.variants: dict[str, dict[str, Any]] = report["variants"]
        self.texts: dict[str, str] = report["plan"].get("texts", TEXTS)
        self.drawn = any(variant.get("curve") for variant in self.variants.values())

    def names(self, stage: str) -> list[str]:
        """The variants of a stage."""
        return [name for name, variant in self.variants.items() if Path(variant["recipe"]).stem == stage]

    def runs(self, name: str) -> dict[int, dict[str, Any]]:
        """{seed: result} of a variant's finished runs; the base is the same under every seed."""
        results = self.report["runs"]
        found = {seed: results.get(BASE if name == BASE else f"{name}-{seed}") for seed in self.report["plan"]["seeds"]}
        return {seed: run for seed, run in found.items() if run}

    def start(self, name: str) -> str:
        """What a variant's gain is counted from."""
        return self.variants[name].get("start") or self.variants[name].get("parent") or BASE

    def bits(self, name: str, text: str) -> float | None:
        """Bits per byte of a variant or the base."""
        totals = [sum(run["nll"][text]) for run in self.runs(name).values()]
        return statistics.fmean(totals) / sum(self.report["texts"][text]["bytes"]) / math.log(2) if totals else None

    def mean(self, name: str, group: str, key: str) -> float | None:
        """Mean over seeds of a figure that not every run has."""
        found = [run[group][key] for run in self.runs(name).values() if run.get(group)]
        return statistics.fmean(found) if found else None

    def less(self, name: str, other: str, text: str, seed: int | None = None) -> dict[str, Any] | None:
        """Bits per byte of `name` less `other` over the seeds that both finished, or one seed; None without any."""
        after, before = self.runs(name), self.runs(other)
        seeds = [each for each in after if each in before and seed in (None, each)]
        if not seeds:
            return None
        sizes, sides = self.report["texts"][text]["bytes"], []
        for side in (before, after):
            nll = np.mean([side[each]["nll"][text] for each in seeds], axis=0)
            units = [{"nll": value, "bytes": size} for value, size in zip(nll.tolist(), sizes, strict=True)]
            sides.append([{"source": text, "nll": sum(nll), "bytes": sum(sizes), "blocks": units}])
        return intervals.difference(*sides)

    def written(self, name: str, measure: str) -> np.ndarray:
        """By place, a measure of what a variant or the base wrote there; the mean over seeds."""
        return np.mean([run["samples"][measure] for run in self.runs(name).values()], axis=0)

    def degeneration(self) -> tuple[list[str], list[list[str]]]:
        """Measures of samples beside the author's own; nothing in a sweep without samples."""
        author, variants = self.report["texts"].get("author"), [BASE, *filter(self.runs, self.variants)]
        if not author:
            return [], []
        rows = [["the author", *(number(statistics.fmean(values)) for values in author.values())]]
        for name in variants:
            cells = [number(float(self.written(name, measure).mean())) for measure in author]
            if name != BASE:
                for place, measure in enumerate(author):
                    sides = [self.written(each, measure).tolist() for each in (self.start(name), name)]
                    found = intervals.difference_of_means(*sides)
                    cells[place] += f", {changed(found and {'bits_per_byte': found[0], 'interval': found[1]})}"
            rows.append([f"`{name}`", *cells])
        return ["", "looping", "repeated", "not French", "copied"], rows

    def spread(self) -> float | None:
        """The largest change of any difference from one seed to another, in bits per byte."""
        spreads = []
        for name, variant in self.variants.items():
            for other in [self.start(name), *variant.get("against", [])]:
                for text in self.texts:
                    each = [self.less(name, other, text, seed) for seed in self.runs(name)]
                    values = [found["bits_per_byte"] for found in each if found]
                    spreads += [max(values) - min(values)] if len(values) > 1 else []
        return max(spreads, default=None)

    def results(self, stage: str) -> str:
        """The stage's part of the page: what each variant reached, and its differences from others."""
        reached, differences = [], []
        for name in self.names(stage):
            variant, start, runs = self.variants[name], self.start(name), list(self.runs(name).values())
            rate = (self.report["recipes"][variant["recipe"]] | variant.get("overrides", {}))["learning_rate"]
            trained = "–" if variant.get("quantised") else f"{float(rate):.0e}".replace("e-0", "e-")
            tokens = f" x {runs[0]['tokens_per_step']:,}" if runs and runs[0].get("tokens_per_step") else ""
            steps = f"{runs[0]['steps']}{tokens}" if runs and runs[0].get("steps") else "–"
            row = [f"`{name}`", f"`{start}`", trained, steps, str(len(runs))]
            for text in self.texts:
                row += [number(self.bits(name, text)), changed(self.less(name, start, text))]
            reached.append(row)
            for other in variant.get("against", []):
                seeds = len(self.runs(name).keys() & self.runs(other).keys())
                figures = [changed(self.less(name, other, text)) for text in self.texts]
                differences.append([f"`{name}`", f"`{other}`", *figures, str(seeds)])
        head = ["variant", "started from", "learning rate", "steps", "seeds"]
        head += [each for name in self.texts.values() for each in (name, "gain")]
        tables = table(head, reached), table(["variant", "less", *self.texts.values(), "seeds"], differences)
        return "\n".join([f"## {stage}\n", *filter(None, tables)])

    def page(self, name: str) -> str:
        """The whole page; `name` is the plan's and the report's."""
        report, movement, memorisation, variants = self.report, [], [], []
        seeds = ", ".join(map(str, report["plan"]["seeds"]))
        for each, variant in self.variants.items():
            if (share := self.mean(each, "moved", "changed")) is not None:
                movement.append([f"`{each}`", f"{share:.1%}", f"{self.mean(each, 'moved', 'relative'):.2g}"])
            if self.mean(each, "token_probability", "train") is not None:
                figures = [self.bits(each, text) for text in ("novel_train", "novel_heldout")]
                figures += [self.mean(each, "token_probability", side) for side in ("train", "heldout")]
                memorisation.append([f"`{each}`", *map(number, figures)])
            overrides = f" Overrides: `{json.dumps(variant['overrides'])}`." if variant.get("overrides") else ""
            variants.append(f"- `{each}`: {variant['recipe']}, seeds {seeds}. {variant.get('says', '')}{overrides}\n")
        trained = []
        for stage, rows in report["manifests"].items():
            train = rows["train"]
            if length := rows.get("sequence_len"):
                trained.append(f"{stage} {train['windows'] * length or train['tail_tokens']:,}")  # rows below a window
            else:
                trained.append(f"{stage} {train['rows']} pairs")
        texts = {text: report["texts"][text] for text in self.texts if report["runs"]}
        head = ["variant", "bpb, trained pages", "bpb, held-out pages", "token probability, trained", "held out"]
        more = {
            MOVEMENT: (["variant", "elements changed", "change over norm"], movement),
            MEMORISATION: (head, memorisation),
            DEGENERATION: self.degeneration(),
        }
        return PAGE.format(
            name=name,
            kafka=KAFKA if any("kafka" in variant["recipe"] for variant in self.variants.values()) else "",
            plan=report["plan"] | {"all": json.dumps(report["plan"]["all"])},
            cpu=report["environment"]["cpu"],
            threads=report["environment"]["threads"],
            trained=", ".join(trained),
            scored=", ".join(f"`{t}` {f['tokens']:,} ({len(f['bytes'])} {f['unit']}s)" for t, f in texts.items()),
            divisors=", ".join(f"{stage} by {divisor}" for stage, divisor in report["plan"]["batch_divisor"].items()),
            base=", ".join(f"{number(self.bits(BASE, text))} on `{text}`" for text in self.texts),
            spread=number(self.spread()),
            stages="\n".join(self.results(stage) for stage in report["plan"]["batch_divisor"] if self.names(stage)),
            more="".join(f"{above}{table(*content)}\n" for above, content in more.items() if content[1]),
            picture=f"![bits per byte over tokens seen]({name}.svg)\n\n" if self.drawn else "",
            variants="".join(variants),
            date=report["date"],
            commit=commit(report["environment"]["git"]),
        )

    def curve(self, name: str) -> list[plots.Point]:
        """(tokens, None, bits per byte of the validation rows), mean over seeds; empty when it was not logged."""
        by_step: dict[int, list[float]] = {}
        runs = list(self.runs(name).values())
        for result in runs:
            for step, _, validation_loss in result.get("log") or []:
                if validation_loss is not None:
                    by_step.setdefault(step, []).append(validation_loss)
        facts = self.report["validation"][Path(self.variants[name]["recipe"]).stem]
        scale = facts["tokens"] / facts["bytes"] / math.log(2)  # nats per token -> bits per byte
        tokens = runs[0]["tokens_per_step"] if runs else 0
        return [(step * tokens, None, statistics.fmean(each) * scale) for step, each in sorted(by_step.items())]

    def draw(self) -> plots.Figure:
        """Held-out bits per byte over tokens seen: one panel per stage, and one per variant with `curve: apart`."""
        panels: dict[str, dict[str, list[plots.Point]]] = {}
        for stage in self.report["plan"]["batch_divisor"]:
            panels[stage] = {}
            for name in self.names(stage):
                if curve := self.variants[name].get("curve") and self.curve(name):
                    panels.setdefault(name if self.variants[name]["curve"] == "apart" else stage, {})[name] = curve
        picture = plots.figure(3.6 * len(panels), 4.4)
        axes = picture.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, series) in zip(axes, panels.items(), strict=True):
            plots.plot_losses(axis, series)
            axis.set_title(f"{title}: {'the novel' if title.startswith('2c') else 'Gallica'}, held out", fontsize=10)
            if series:
                axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axes[0].set_ylabel("bits per byte (lower is better)")
        return picture


def load(path: Path) -> Sweep:
    """The sweep of a report. Raises BadInput when there is none, or it is damaged."""
    return read_json(path, f"`make bench-{path.stem}` makes it", Sweep)


def write(path: Path) -> None:
    """train.md and train.svg beside train.json."""
    sweep = load(path)
    write_text(path.with_suffix(".md"), sweep.page(path.stem))
    if sweep.drawn:
        write_text(path.with_suffix(".svg"), plots.svg(sweep.draw(), path.stem))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    write(parser.parse_args().report)


if __name__ == "__main__":
    run(main)
