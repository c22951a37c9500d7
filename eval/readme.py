"""Puts a generated table between the marks of a README: only bench/prep_speed.py still does."""

from pathlib import Path

from prep.common import BadInput, atomic_write


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
