"""Write the figures of the committed reports into the READMEs, between their marks: the demo's, and what evaluation costs.

python eval/readme.py       # or: make readme, after a make demo
"""

import argparse
from pathlib import Path
from typing import Any

from eval import report, tables
from prep.common import BadInput, atomic_write, run

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "eval/reports/demo.json"
DURATION = ROOT / "eval/reports/demo.seconds"  # demo/demo.sh writes it, when it ran from the beginning to the end
UNSEEN = ["gallica_heldout", "novel_heldout", "english", "code"]


def bits(stage: dict[str, Any], task: str) -> str:
    return tables.number(stage["scores"][task]["bits_per_byte"])


def where(evidence: dict[str, Any]) -> str:
    """The machine of a report."""
    machine = evidence["environment"]
    return f"{machine['cpu']}, {machine['threads']} cores"


def scores(evidence: dict[str, Any], minutes: float) -> str:
    """README's table: bits per byte of every row on every text that no stage was trained on."""
    rows = [[f"`{name}`", *(bits(stage, task) for task in UNSEEN)] for name, stage in tables.measured(evidence).items()]
    return (
        f"{report.markdown_table((['stage', *(f'`{task}`' for task in UNSEEN)], rows))}\n\n"
        f"Measured by `make demo` on {where(evidence)}, no GPU, in {minutes:.0f} minutes after installation.\n"
    )


def cost(evidence: dict[str, Any]) -> str:
    """What the demo's evaluation took, out of its own report."""
    spent = {
        key: sum(stage["seconds"][key] for stage in evidence["stages"].values() if stage)
        for key in ("scoring", "sampling")
    }
    tokens = sum(
        score["tokens"] for stage in evidence["stages"].values() if stage for score in stage["scores"].values()
    )
    return (
        f"The demo's evaluation took {spent['scoring']:.0f} s to score {tokens:,} tokens and {spent['sampling']:.0f} s to write, on "
        f"{evidence['environment']['threads']} threads of {evidence['environment']['cpu']}."
    )


def filled(page: str, mark: str, content: str) -> str:
    """The page with `content` between `<!-- mark:begin -->` and `<!-- mark:end -->`. Raises BadInput without the marks."""
    begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise BadInput(
            f"the page has no single pair of marks {begin.strip()} and {end}: put them where the table belongs"
        )
    return page[: page.index(begin) + len(begin)] + content + page[page.index(end) :]


def fill(path: Path, mark: str, content: str) -> None:
    """Put `content` between the marks of the page at `path`. Raises BadInput without the marks."""
    text = filled(path.read_text(encoding="utf-8"), mark, content)
    with atomic_write(path) as file:
        file.write(text)


def pages() -> dict[Path, str]:
    """Each document as the committed report would have it."""
    evidence = report.load(REPORT)
    seconds = int(DURATION.read_text(encoding="utf-8"))
    contents = [
        (ROOT / "README.md", "demo", scores(evidence, seconds / 60)),
        (ROOT / "eval/README.md", "demo-cost", f"{cost(evidence)}\n"),
    ]
    result: dict[Path, str] = {}
    for path, mark, content in contents:
        result[path] = filled(result.get(path) or path.read_text(encoding="utf-8"), mark, content)
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, text in pages().items():
        with atomic_write(path) as file:
            file.write(text)
        print(f"filled: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run(main)
