"""What several benches do: continue a report, write it with its page, measure in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from prep.common import BadInput, read_json, write_json, write_text

REMEDY = "move it away to start again"


def resumed(path: Path, new: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The report at `path` to add to, `new` where there is none. Raises BadInput where it is damaged or of other `facts`:
    figures of two machines or models are not to be compared in one table."""
    if not path.exists():
        return new

    def pick(report: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        recorded = report.get("facts", report)
        return new | report, [key for key in facts if recorded.get(key) != facts[key]]

    report, differing = read_json(path, REMEDY, pick)
    if differing:
        raise BadInput(f"{path} was made with another {', '.join(differing)}: {REMEDY}")
    return report


def write_report(path: Path, report: dict[str, Any], page: str) -> None:
    """The report, and its Markdown page beside it."""
    write_json(path, report)
    write_text(path.with_suffix(".md"), page)


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own: on a CPU malloc keeps much of what forward passes used, 5 GB after three rows."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise BadInput("a process was killed (out of memory?); run again to resume") from error
