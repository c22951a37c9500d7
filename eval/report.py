"""Turn the evidence of a run into pages: verdicts, tables, loss curves, bits per byte by stage, samples.

Everything on them comes from the one JSON file; the same file gives the same bytes, pictures included.

    python eval/report.py eval/reports/demo.json       # writes demo.md, its pictures, and demo.html beside it
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jsonschema
from markupsafe import Markup

from eval import pictures, tables, verdict
from eval.tables import Table, measured
from prep.common import BadInput, atomic_write, commit, run

HERE = Path(__file__).parent
SCHEMA = HERE / "report.schema.json"


@dataclass(frozen=True)
class Section:
    """A part of the page: a title, what to make of it, and what it shows."""

    title: str
    text: str = ""
    picture: str | None = None  # its kind: bpb, loss, position, memory
    table: Table | None = None


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


def about(report: dict[str, Any]) -> str:
    """When, from what, and where it was measured."""
    where = report["environment"]
    missing = [name for name, stage in report["stages"].items() if stage is None]
    return (
        f"{report['date'][:10]}, {commit(where['git'])}, {where['cpu']}, device {where['device']}, {where['dtype']}. "
        "Generated from the JSON of the same name; what the figures mean stands in eval/README.md."
        + (f" Not measured: {', '.join(missing)}." if missing else "")
    )


def decoding(report: dict[str, Any]) -> str:
    """How the samples were drawn."""
    parameters = [f"{key.replace('_', ' ')} {value}" for key, value in report["arguments"]["decoding"].items()]
    return f"Same prompts, seed and decoding for every stage: {', '.join(parameters)}."


def sections(report: dict[str, Any]) -> list[Section]:
    """What the page shows between the verdicts and the samples; what was not measured is left out."""
    units = {
        task: f"{score['interval']['units']} {score['interval']['unit']}s of {task}"
        for stage in measured(report).values()
        for task, score in stage["scores"].items()
        if score
    }
    parts = [
        Section(
            "Bits per byte",
            f"Lower is better. In brackets the 95 % bootstrap interval, over {', '.join(units.values())}. Adapters stand on "
            "their base as their recipes quantise it.",
            "bpb",
            tables.overview(report),
        ),
    ]
    if report["differences"]:
        parts.append(
            Section(
                "What each stage changed",
                "The difference on the same text, in bits per byte, with its paired 95 % interval; a star where that leaves "
                "out zero.",
                table=tables.changes(report),
            )
        )
    parts.append(Section("Loss", "As the trainer logged it.", "loss"))
    parts.append(
        Section(
            "By position in the context",
            "The same pieces of text in bits per byte, with so many tokens before them: lower on the right means that far "
            "context is used. The last column is the paired difference, with its 95 % interval.",
            "position",
            tables.far_context(report),
        )
    )
    parts.append(
        Section(
            "Recited or written?",
            "The typical probability of a true token, and the share of 50-token passages that one draw in a thousand would give "
            "word by word: for pages the last stage was trained on, and for pages held out. Then the longest run of words in "
            "each sample that stands in the training text, beside what the author's held-out pages share with the rest.",
            "memory",
            tables.recited(report),
        )
    )
    parts.append(
        Section(
            "Spoiled?",
            "Repeated 4-grams within a sample, different 2-grams over all, samples that loop, that stop by themselves, words "
            "that are not French (proper names count), lines like page numbers or running headers. The novel's own held-out "
            "pages, cut to a sample's length, say what is normal.",
            table=tables.spoiled(report),
        )
    )
    parts.append(
        Section(
            "Whose manner?",
            "Burrows's Delta, on the 100 most frequent words: lower is nearer; below 900 words it is noise, and left out. The novel's own "
            "held-out pages, cut to the size of the samples, say how near so few words can come. Then the share of words in dialogue, the words of a sentence "
            "(median, and the middle 80 %), and the novel's names in a thousand words.",
            table=tables.manner(report),
        )
    )
    parts.append(
        Section(
            "Perplexity",
            "Of a token, a word, a byte. Token perplexity compares only models that share a tokenizer.",
            table=tables.perplexities(report),
        )
    )
    parts.append(Section("Texts", table=tables.texts(report)))
    parts.append(Section("Weights", table=tables.files(report)))
    return parts


def versions(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in report["environment"]["versions"].items()) + "."


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown_table(table: Table) -> str:
    """A Markdown table whose columns also line up in a terminal; the first is text, the others are figures."""
    head, rows = table
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(("-" * (width + 2)) if i == 0 else ("-" * (width + 1) + ":") for i, width in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


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


def markdown(report: dict[str, Any], drawn: dict[str, str]) -> str:
    """The Markdown page; `drawn` has the file names of the pictures there are."""
    parts = [f"# Evaluation: {report['run']}", about(report)]
    parts.append("\n".join(f"- **{name}**: {line}" for name, line in verdict.lines(report).items()))
    for section in sections(report):
        picture = drawn.get(section.picture or "")
        if picture or section.table:
            parts += [f"## {section.title}", section.text]
            parts += [markdown_table(section.table)] if section.table else []
            parts += [f"![{section.title}]({picture})"] if picture else []
    parts += ["## Samples", decoding(report), *sample_pages(report), versions(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- HTML -------------------------------------------------------------------------------------------------------------


def marked(stage: str, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample as the template wants it, cut where its copied passage begins and ends."""
    text, copied = sample["text"], sample["copied"] or {"start": 0, "end": 0}
    start, end = copied["start"], copied["end"]
    return {**sample, "stage": stage, "before": text[:start], "shared": text[start:end], "after": text[end:]}


def html(report: dict[str, Any], drawn: dict[str, str]) -> str:
    """The page as one file that needs no other; `drawn` has the pictures as SVG."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(
        report=report,
        about=about(report),
        verdicts=verdict.lines(report),
        thresholds=verdict.EXPLAINED,
        sections=[s for s in sections(report) if s.table or s.picture in drawn],
        pictures={kind: Markup(text[text.index("<svg") :]) for kind, text in drawn.items()},
        decoding=decoding(report),
        samples={
            prompt["name"]: [
                marked(name, sample)
                for name, stage in measured(report).items()
                for sample in stage["samples"]
                if sample["prompt"] == prompt["name"]
            ]
            for prompt in report["prompts"]
        },
        versions=versions(report),
    )


# --- both -------------------------------------------------------------------------------------------------------------


def draw(report: dict[str, Any]) -> dict[str, str]:
    """The pictures that there is something to draw for, as SVG, by their kind."""
    figures = {
        "bpb": pictures.draw_bits(report),
        "loss": pictures.draw_losses(report),
        "position": pictures.draw_positions(report),
        "memory": pictures.draw_memory(report),
    }
    return {kind: pictures.svg(figure, picture_name(report, kind)) for kind, figure in figures.items() if figure}


def picture_name(report: dict[str, Any], kind: str) -> str:
    return f"{report['run']}.{kind}.svg"


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write the pages and their pictures into `folder`; returns the Markdown page's path."""
    drawn = draw(report)
    names = {kind: picture_name(report, kind) for kind in drawn}
    target = folder / f"{report['run']}.md"
    contents = {folder / names[kind]: text for kind, text in drawn.items()}
    contents |= {target: markdown(report, names), target.with_suffix(".html"): html(report, drawn)}
    for path, text in contents.items():
        with atomic_write(path) as file:
            file.write(text)
    return target


def terminal(report: dict[str, Any]) -> str:
    """What is printed at the end: the table of bits per byte, and a line a stage."""
    lines = [f"{name}: {line}" for name, line in verdict.lines(report).items()]
    return "\n".join([markdown_table(tables.overview(report)), "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the JSON that eval/evaluation.py wrote")
    args = parser.parse_args()
    report = load(args.report)
    print(terminal(report))
    page = write(report, args.report.parent)
    print(f"report: {page}, {page.with_suffix('.html')}")


if __name__ == "__main__":
    run(main)
