"""The page and the picture of a training bench, from bench/reports/train.json, or another plan's, and nothing else.

A table a stage: each variant's bits per byte after it, what it gained over what it started from, and its difference to
the variants it is measured against. Figures are means over seeds, intervals 95 % over held-out works (eval/intervals.py).
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from eval import pictures
from eval.readme import fill
from eval.report import markdown_table
from eval.tables import Table, changed, number
from prep.common import BadInput, atomic_write, commit

TABLES, SUMMARY = "bench-train", "bench-train-summary"  # marks in recipes/README.md and in README.md
REFERENCE = "bench/reference/"  # where its recipes lie
TEXTS = ("gallica_heldout", "novel_heldout")


def load(path: Path) -> dict[str, Any]:
    """The report. Raises BadInput when there is none, or it is of another format."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); `make bench-train` makes it") from error
    if report.get("format") != 1:
        raise BadInput(f"{path} is of format {report.get('format')}, not 1; `make bench-train` makes it anew")
    return report


def stages(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{stage: {variant: its part of the report}}, in the order of the plan's batch_divisor."""
    return {
        stage: {name: variant for name, variant in report["variants"].items() if variant["stage"] == stage}
        for stage in report["plan"]["batch_divisor"]
    }


def finished(variant: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a variant's finished runs."""
    return [result for result in variant["runs"].values() if result]


def bits(variant: dict[str, Any], text: str) -> float | None:
    """Mean over seeds of the bits per byte."""
    values = [result["scores"][text]["bits_per_byte"] for result in finished(variant)]
    return statistics.fmean(values) if values else None


def started(report: dict[str, Any], variant: dict[str, Any], text: str) -> float | None:
    """Bits per byte of what a variant started from."""
    (start,) = variant["gain"]
    if start in report["variants"]:
        return bits(report["variants"][start], text)
    return report["base"]["scores"][text]["bits_per_byte"] if report["base"] else None


def difference(compared: dict[str, Any] | None) -> str:
    """The mean over seeds of a comparison."""
    return changed(compared["mean"] if compared else None)


def rate(variant: dict[str, Any]) -> str:
    """Its learning rate, as people write it; a dash where nothing is trained."""
    return "–" if variant.get("rounded") else f"{float(variant['settings']['learning_rate']):.0e}".replace("e-0", "e-")


def results_table(variants: dict[str, dict[str, Any]]) -> Table:
    """What each variant of a stage reached."""
    head = [
        "variant",
        "started from",
        "learning rate",
        "steps",
        "seeds",
        "Gallica",
        "gain there",
        "novel",
        "gain there",
    ]
    rows = []
    for name, variant in variants.items():
        done = finished(variant)
        (start,) = variant["gain"]
        step = f"{done[0]['steps']['reached']} x {done[0]['tokens_a_step']:,}" if done and done[0]["steps"] else "–"
        rows.append([f"`{name}`", f"`{start}`", rate(variant), step, str(len(done))])
        for text in TEXTS:
            rows[-1] += [number(bits(variant, text)), difference(variant["gain"][start][text])]
    return head, rows


def comparison_table(variants: dict[str, dict[str, Any]]) -> Table:
    """Each variant less those it is measured against."""
    rows = [
        [f"`{name}`", f"`{other}`", *(difference(compared[text]) for text in TEXTS), str(len(seeds(compared)))]
        for name, variant in variants.items()
        for other, compared in variant["against"].items()
    ]
    return ["variant", "less", "Gallica", "novel", "seeds"], rows


def seeds(compared: dict[str, Any]) -> dict[str, Any]:
    """The seeds that a comparison rests on."""
    return compared[TEXTS[0]]["seeds"] if compared[TEXTS[0]] else {}


def weights_table(variants: dict[str, dict[str, Any]]) -> Table:
    """How much of the weights a full-weight stage moved: what rounding leaves of a learning rate."""
    rows = []
    for name, variant in variants.items():
        moved = [result["movement"] for result in finished(variant) if result["movement"]]
        if moved:
            changed, relative = (statistics.fmean(each[key] for each in moved) for key in ("changed", "relative"))
            rows.append([f"`{name}`", f"{changed:.1%}", f"{relative:.2g}"])
    return ["variant", "elements changed", "change over norm"], rows


def memory_table(variants: dict[str, dict[str, Any]]) -> Table:
    """Pages that were trained on against pages that were not."""
    rows = []
    for name, variant in variants.items():
        found = [result["memorisation"] for result in finished(variant) if result["memorisation"]]
        if found:
            typical = [
                statistics.fmean(each[side]["token_probability"] for each in found) for side in ("train", "heldout")
            ]
            rows.append(
                [
                    f"`{name}`",
                    number(bits(variant, "novel_train")),
                    number(bits(variant, "novel_heldout")),
                    *map(number, typical),
                ]
            )
    return ["variant", "bits on trained pages", "on held-out pages", "token probability, trained", "held out"], rows


def budget(report: dict[str, Any]) -> str:
    """A sentence: on what machine, on how many tokens, scored on how many."""
    where = report["environment"]
    trained = ", ".join(
        f"{stage} {manifest['train']['windows'] * length(report, stage):,}"
        for stage, manifest in report["manifests"].items()
    )
    scored = []
    if report["base"]:
        for text in TEXTS:
            found = report["base"]["scores"][text]
            unit = found["interval"]
            scored.append(f"`{text}` {found['tokens']:,} ({unit['units']} {unit['unit']}s)")
    divisors = ", ".join(f"{stage} {divisor}" for stage, divisor in report["plan"]["batch_divisor"].items())
    return (
        f"{where['cpu']}, {where['threads']} cores, no GPU; a run has {report['plan']['threads']}. Tokens of one pass: "
        f"{trained}. Scored tokens: {', '.join(scored) or '–'}. Every recipe's tokens a step divided by: {divisors}."
    )


def seed_spread(report: dict[str, Any]) -> float | None:
    """The most that any difference of the tables moved from one seed to another, in bits per byte."""
    found = [
        [seed["bits_per_byte"] for seed in compared[text]["seeds"].values()]
        for variant in report["variants"].values()
        for compared in (variant["gain"] | variant["against"]).values()
        for text in TEXTS
        if compared[text] and len(compared[text]["seeds"]) > 1
    ]
    return max((max(values) - min(values) for values in found), default=None)


def length(report: dict[str, Any], stage: str) -> int:
    """Tokens a window."""
    return report["manifests"][stage]["sequence_len"]


def tables(report: dict[str, Any], level: str = "###") -> str:
    """What goes into recipes/README.md: results and comparisons, a stage after the other."""
    parts = [budget(report) + "\n"]
    base = report["base"]["scores"] if report["base"] else None
    if base:
        figures = ", ".join(f"{number(base[text]['bits_per_byte'])} on `{text}`" for text in TEXTS)
        parts.append(f"The base before any training: {figures}.\n")
    spread = seed_spread(report)
    if spread is not None:
        parts.append(f"From one seed to the other a difference of these tables moved by {spread:.3f} at most.\n")
    for stage, variants in stages(report).items():
        parts.append(f"{level} {stage}\n\n{markdown_table(results_table(variants))}\n")
        compared = comparison_table(variants)
        if compared[1]:
            parts.append(f"{markdown_table(compared)}\n")
    return "\n".join(parts)


def summary(report: dict[str, Any]) -> str:
    """What goes into README.md: a row a stage, ours against the reference as it is and at its best learning rate.

    Ours is the stage's first variant, the reference's are those that are measured against it; the text is that which
    the stage is for.
    """
    rows = []
    for stage, variants in stages(report).items():
        if not variants:
            continue
        text = TEXTS[stage == "2c"]
        ours = next(iter(variants))
        theirs = [
            name
            for name, variant in variants.items()
            if variant["recipe"].startswith(REFERENCE) and ours in variant["against"]
        ]
        done = {name: score for name in theirs[1:] if (score := bits(variants[name], text)) is not None}
        best = min(done, key=done.__getitem__, default=None)
        before = started(report, variants[ours], text)
        rows.append([f"`{stage}`", f"`{text}`", number(before), number(bits(variants[ours], text))])
        for name in next(iter(theirs), None), best:
            if name is None:
                rows[-1] += [number(None), difference(None)]
                continue
            variant = variants[name]
            rows[-1] += [
                f"{number(bits(variant, text))} at {rate(variant)}",
                difference(variant["against"][ours][text]),
            ]
    head = ["stage", "text", "before", "ours", "reference", "less ours", "reference retuned", "less ours"]
    return f"{markdown_table((head, rows))}\n"


def page(report: dict[str, Any], name: str) -> str:
    """The whole page; `name` is the plan's, and the report's."""
    parts = [
        "# Which settings learn\n",
        "Bits per byte on text that no variant was trained on; less is better. Means over seeds; in brackets the 95 %\n"
        "interval over held-out works (blocks of the novel), paired on the same text; * where it leaves out zero. A dash is\n"
        f"not measured. Made by `make bench-{name}` from bench/{name}.yml.\n",
        tables(report, "##"),
        "## What moved where every weight trains\n\nMedian over the matrices, after rounding the base to the trained weights' precision.\n",
        f"{markdown_table(weights_table(report['variants']))}\n",
        "## By heart?\n\n`token probability`: geometric mean over spans of 50 tokens with 200 tokens of true text before them.\n",
        f"{markdown_table(memory_table(report['variants']))}\n",
        "## What each variant is\n",
        "".join(
            f"- `{name}`: {variant['recipe']}, seeds {', '.join(map(str, variant['seeds']))}. {variant.get('says', '')}"
            + (f" Overrides: `{json.dumps(variant['overrides'])}`." if variant.get("overrides") else "")
            + "\n"
            for name, variant in report["variants"].items()
        ),
        f"\nOf every variant: `{json.dumps(report['plan']['all'])}`, profile `{report['plan']['profile']}`.\n",
        f"\n![bits per byte over tokens seen]({name}.svg)\n\n{report['date']}, "
        f"{commit(report['environment']['git'])}.\n",
    ]
    return "\n".join(parts)


def curve(report: dict[str, Any], variant: dict[str, Any]) -> list[tuple[float, float]]:
    """(tokens seen, bits per byte of the validation rows), the mean over seeds; empty when nothing is finished.

    A variant that logged no validation loss has two points, what it started from and what it reached, as they are scored:
    for 2b and 2c the validation rows are the text that is scored.
    """
    done, stage = finished(variant), variant["stage"]
    if not variant.get("curve") or not done:
        return []
    by_step: dict[int, list[float]] = {}
    for result in done:
        for point in result["log"] or []:
            if point["eval_loss"] is not None:
                by_step.setdefault(point["step"], []).append(point["eval_loss"])
    validation = report["validation"][stage]
    scale = validation["tokens"] / validation["bytes"] / math.log(2)  # nats a token -> bits a byte
    step = done[0]["tokens_a_step"]
    if by_step:
        return [(number * step, statistics.fmean(losses) * scale) for number, losses in sorted(by_step.items())]
    text = TEXTS[stage == "2c"]
    start, end = started(report, variant, text), bits(variant, text)
    return [(0, start), (done[0]["steps"]["reached"] * step, end)] if start is not None and end is not None else []


def draw(report: dict[str, Any]) -> pictures.Figure:
    """Held-out bits per byte over tokens seen: a panel a stage with a line for each variant that logged a curve, and one
    for each variant whose curve stands apart, because it saw more tokens than the others."""
    panels: list[tuple[str, str, list[str]]] = []
    for stage, variants in stages(report).items():
        drawn = [name for name, variant in variants.items() if curve(report, variant)]
        apart = [name for name in drawn if variants[name]["curve"] == "apart"]
        panels += [(stage, stage, [name for name in drawn if name not in apart])]
        panels += [(stage, name, [name]) for name in apart]
    picture = pictures.figure(3.6 * len(panels), 4.4)
    for axis, (stage, title, names) in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, colour, mark in zip(names, pictures.COLOURS, pictures.MARKS, strict=False):
            tokens, bits_per_byte = zip(*curve(report, report["variants"][name]), strict=True)
            thousands = [count / 1000 for count in tokens]
            axis.plot(thousands, bits_per_byte, label=name, color=colour, marker=mark, markersize=4, linewidth=1.4)
        axis.set_title(f"{title}: {'the novel' if stage == '2c' else 'Gallica'}, held out", fontsize=10)
        axis.set_xlabel("tokens seen, thousands")
        axis.grid(alpha=0.3)
        if names:
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    picture.axes[0].set_ylabel("bits per byte (lower is better)")
    return picture


def write(path: Path, tables_in: Path | None = None, summary_in: Path | None = None) -> None:
    """train.md and train.svg beside train.json, the tables and the summary between the marks of a page each."""
    report = load(path)
    texts = {
        path.with_suffix(".md"): page(report, path.stem),
        path.with_suffix(".svg"): pictures.svg(draw(report), path.stem),
    }
    for target, text in texts.items():
        with atomic_write(target) as file:
            file.write(text)
    if tables_in:
        fill(tables_in, TABLES, tables(report))
    if summary_in:
        fill(summary_in, SUMMARY, summary(report))
