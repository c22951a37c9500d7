"""Make the pages of a run from its JSON: verdicts, tables, loss curves, bits per byte by stage, samples.

The same JSON gives the same bytes, plots included.

    python eval/report.py eval/reports/demo.json       # writes demo.md, its plots, and demo.html beside it
"""

from prep.command import run

import argparse
import json
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import jsonschema
from markupsafe import Markup

from eval import plots, tables, verdict
from eval.tables import Table, measured
from prep.common import BadInput, commit, read_json, write_text

HERE = Path(__file__).parent
SCHEMA = HERE / "report.schema.json"
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined)


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    text: str = ""
    plot: str | None = None  # its kind: bpb, loss, position, memory
    table: Table = ([], [])


def check(report: Any, path: Path) -> None:
    """Raises BadInput when the report is not what the schema describes, naming the first wrong place."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(report))
    if error:
        where = ".".join(map(str, error.absolute_path)) or "the whole"
        raise BadInput(f"{path} is not a report of this version: {where}: {error.message[:200]}")


def load(path: Path) -> dict[str, Any]:
    """Read and check a report; a copy's run is the copy's name. Raises BadInput when it is missing, torn or not of the schema."""
    report: dict[str, Any] = read_json(path, "eval/evaluation.py writes it")
    check(report, path)
    return report | {"run": path.stem}


def about(report: dict[str, Any]) -> str:
    """When, from what, and where it was measured."""
    where = report["environment"]
    missing = [name for name, stage in report["stages"].items() if stage is None]
    return (
        f"{report['date'][:10]}, {commit(where['git'])}, {where['cpu']}, device {where['device']}, {where['dtype']}. "
        "Generated from the JSON of the same name; eval/README.md defines the figures."
        + (f" Not measured: {', '.join(missing)}." if missing else "")
    )


def decoding(report: dict[str, Any]) -> str:
    """How the samples were drawn."""
    parameters = ", ".join(f"{key} {value}" for key, value in report["arguments"]["decoding"].items())
    greedy = "; questions greedy" if report.get("questions") else ""
    return f"Same prompts, seed and decoding for every stage: {parameters.replace('_', ' ')}{greedy}."


def sections(report: dict[str, Any]) -> list[Section]:
    """The page between the verdicts and the samples; the writers leave out what has neither rows nor plot."""
    units = {
        task: "{units} {unit}s".format(**score["interval"]) + f" of {task}"
        for stage in measured(report).values()
        for task, score in stage["scores"].items()
        if score
    }
    return [
        Section(
            "Bits per byte",
            f"Lower is better. In brackets the 95 % bootstrap interval, over {', '.join(units.values())}. Adapters are scored "
            "on their base as their recipes quantise it.",
            "bpb",
            tables.overview(report),
        ),
        Section(
            "What each stage changed",
            "The difference on the same text, in bits per byte, with its paired 95 % interval; a star where that excludes zero.",
            table=tables.changes(report),
        ),
        Section("Loss", "As the trainer logged it; stages with the same rows on one axis.", "loss"),
        Section(
            "By position in the context",
            "The same chunks of text in bits per byte, with this many tokens before them: lower on the right means that far "
            "context is used. The last column is the paired difference, with its 95 % interval.",
            "position",
            tables.far_context(report),
        ),
        Section(
            "Memorisation",
            "The typical probability of a true token, and the share of 50-token chunks that one draw in a thousand would give "
            "word for word: for pages that the last stage was trained on, and for held-out pages. Then the longest sequence of "
            "words in each sample that is in the training text, beside what the author's held-out pages share with the rest.",
            "memory",
            tables.memorisation(report),
        ),
        Section(
            "Degeneration",
            "Repeated 4-grams within a sample, distinct 2-grams over all, samples that loop, that stop by themselves, words "
            "that are not French (proper names count), lines like page numbers or running headers. The novel's own held-out "
            "pages, cut to a sample's length, show what is normal.",
            table=tables.degeneration(report),
        ),
        Section(
            "Questions",
            "Asked in the model's own chat template, greedy decoding; the answers are below. Right: the reference is among the "
            "words, or is a number of its own. The language is py3langid's guess for answers of 20 letters or more. What each "
            "stage changed, above, has the paired differences of these shares, where both answers can be judged.",
            table=tables.questions(report),
        ),
        Section(
            "lm-eval's tasks",
            "By lm-eval itself, with its standard error; which way is better depends on the metric.",
            table=tables.benchmarks(report),
        ),
        Section(
            "Style",
            "Burrows's Delta, on the 100 most frequent words: lower is nearer; below 900 words it is noise, and left out. The "
            "novel's own held-out pages, cut to the size of the samples, show how near so few words can come. Then the share of "
            "words in dialogue, the words per sentence (median, and the middle 80 %), and the novel's names per thousand words.",
            table=tables.style(report),
        ),
        Section(
            "Blind reading",
            f"Of two passages after the same held-out lines, which is the author's? {tables.readers(report)} A stage that nobody "
            "can tell is taken for the author half the time: a star where Wilson's 95 % interval excludes 50 %. The controls' "
            "sides are alike: what is told there is noise. The pairs with their answers are below.",
            table=tables.taken(report),
        ),
        Section(
            "Which would you go on reading?",
            "Stage against stage, in a Bradley-Terry model: a strength is in nats, zero the mean, with its 95 % interval.",
            table=tables.preferred(report),
        ),
        Section(
            "Perplexity",
            "Token perplexity compares only models that share a tokenizer.",
            table=tables.perplexities(report),
        ),
        Section("Texts", table=tables.texts(report)),
        Section("Weights", table=tables.files(report)),
    ]


def shown(sections: list[Section], drawn: Container[str | None]) -> list[Section]:
    """Those that have rows or a plot."""
    return [section for section in sections if section.table[1] or section.plot in drawn]


def label(stage: str, sample: dict[str, Any]) -> str:
    """What stands over a sample, or over the answer to a question."""
    drawn = f", seed {sample['seed']}, no. {sample['index'] + 1}" if "seed" in sample else ""
    return f"{stage}{drawn}, {sample['tokens']} tokens" + (", ended by the model" if sample["ended"] else "")


def samples_by_prompt(report: dict[str, Any]) -> list[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Each prompt with the samples of every stage, each question with its answers, each pair that was read with who wrote what."""
    written = [
        {"label": label(name, sample), "prompt": sample.get("question"), **sample}
        for name, stage in measured(report).items()
        for sample in [*stage["samples"], *stage.get("answers", ())]
    ]
    written.sort(key=lambda sample: sample.get("index", 0))
    asked = [{"name": each["name"], "text": each["question"]} for each in report.get("questions", ())]
    result = [(prompt, [s for s in written if s["prompt"] == prompt["name"]]) for prompt in report["prompts"] + asked]
    reading = report.get("reading") or {"figures": None}
    for number, pair in enumerate(reading["pairs"] if reading["figures"] else (), 1):
        chosen = [answer["choice"] for answer in pair["answers"]]
        sides = enumerate(zip(pair["by"], pair["texts"], strict=True))
        shown = [{"label": f"{by}, chosen {chosen.count(i)} of {len(chosen)}", "text": text} for i, (by, text) in sides]
        result.append(({"name": f"Pair {number}", "text": pair["lines"]}, shown))
    return result


def versions(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in report["environment"]["versions"].items()) + "."


# --- Markdown ---------------------------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """A text as a Markdown quotation, with its own Markdown signs escaped."""
    escaped = re.sub(r"[\\`*_<>#\[\]|]", r"\\\g<0>", text.strip("\n"))
    return "\n".join(f"> {line}".rstrip() for line in escaped.split("\n"))


def markdown(report: dict[str, Any], drawn: dict[str, str]) -> str:
    """The Markdown page; `drawn` has the file names of the plots."""
    parts = [f"# Evaluation: {report['run']}", about(report)]
    parts.append("\n".join(f"- **{name}**: {line}" for name, line in verdict.lines(report).items()))
    for section in shown(sections(report), drawn):
        parts += [f"## {section.title}", section.text]
        parts += [tables.markdown(section.table)] if section.table[1] else []
        parts += [f"![{section.title}]({quote(drawn[section.plot])})"] if section.plot in drawn else []
    parts += ["## Samples", decoding(report)]
    for prompt, samples in samples_by_prompt(report):
        parts += [f"### {prompt['name']}", "The prompt:", quoted(prompt["text"])]
        for sample in samples:
            parts.append(f"**{sample['label']}**:")
            parts.append(quoted(sample["text"]) if sample["text"].strip() else "> (nothing)")
    return "\n\n".join(part for part in [*parts, versions(report)] if part) + "\n"


# --- HTML -------------------------------------------------------------------------------------------------------------


def marked(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample as the template needs it, split where its copied words begin and end."""
    text, copied = sample["text"], sample.get("copied") or {"start": 0, "end": 0}
    start, end = copied["start"], copied["end"]
    return {**sample, "before": text[:start], "shared": text[start:end], "after": text[end:]}


def render(sections: list[Section], plots: dict[str, str], **content: Any) -> str:
    """page.html.jinja filled in: one file that needs no other. `plots` has SVG texts by kind."""
    content |= {"sections": shown(sections, plots), "thresholds": verdict.EXPLAINED}
    content["plots"] = {kind: Markup(text[text.index("<svg") :]) for kind, text in plots.items()}
    return TEMPLATES.get_template("page.html.jinja").render(content)


def html(report: dict[str, Any], drawn: dict[str, str]) -> str:
    """The HTML page; `drawn` has the plots as SVG."""
    return render(
        sections(report),
        drawn,
        title=f"Evaluation: {report['run']}",
        about=[("", about(report))],
        verdicts=verdict.lines(report).items(),
        warning="",
        decoding=decoding(report),
        prompts=[(prompt, list(map(marked, samples))) for prompt, samples in samples_by_prompt(report)],
        versions=versions(report),
    )


# --- both -------------------------------------------------------------------------------------------------------------


def reading_page(report: dict[str, Any]) -> str:
    """The page of a report's blind reading."""
    return TEMPLATES.get_template("reading.html.jinja").render(run=report["run"], reading=report["reading"])


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write the pages and their plots into `folder`; returns the Markdown page's path."""
    figures = {
        "bpb": plots.draw_bits(report),
        "loss": plots.draw_losses(report),
        "position": plots.draw_positions(report),
        "memory": plots.draw_memory(report),
    }
    names = {kind: f"{report['run']}.{kind}.svg" for kind, figure in figures.items() if figure}
    drawn = {kind: plots.svg(figure, names[kind]) for kind, figure in figures.items() if figure}
    target = folder / f"{report['run']}.md"
    contents = {folder / names[kind]: text for kind, text in drawn.items()}
    contents |= {target: markdown(report, names), target.with_suffix(".html"): html(report, drawn)}
    if report.get("reading"):
        contents[target.with_suffix(".reading.html")] = reading_page(report)
    for path, text in contents.items():
        write_text(path, text)
    return target


def publish(report: dict[str, Any], folder: Path) -> None:
    """Write the pages; print the table of bits per byte, a line for each stage, and where the pages are."""
    page = write(report, folder)
    print(f"{tables.markdown(tables.overview(report))}\n")
    for name, line in verdict.lines(report).items():
        print(f"{name}: {line}")
    print(f"report: {page}, {page.with_suffix('.html')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the JSON that eval/evaluation.py wrote")
    args = parser.parse_args()
    publish(load(args.report), args.report.parent)


if __name__ == "__main__":
    run(main)
