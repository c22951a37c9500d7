"""The benchmark's arithmetic, and prep/README.md's tables against the committed report."""

import json
from pathlib import Path

import pytest

from bench.prep_speed import growth, perturbed, tables

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "bench" / "reports" / "prep.json"


def test_growth_leaves_the_start_of_programs_out():
    def size(mb: float, windows: int, seconds: float) -> dict:
        return {
            "text_mb": mb,
            "ours": {"windows": windows, "cpu_seconds": seconds},
            "naive": {"windows_a_cpu_second": 500},
        }

    found = growth([size(10, 6_000, 20), size(30, 18_000, 26), size(50, 30_000, 30)])
    assert found == {"windows_a_cpu_second": 2400, "times_naive_a_core": 4.8, "cpu_seconds_a_mb": 0.25}


def test_a_perturbed_book_is_another_on_the_same_pages():
    import random

    from prep.duplicates import fingerprint, shared

    text = "\n".join(
        f"Le vieux pêcheur numéro {n} du port regardait la mer grise en silence.\nTITRE {n}" for n in range(900)
    )
    words = text.split()
    other = perturbed(text, random.Random(1))
    assert other.count("\n") == text.count("\n") and "TITRE 7\n" in other and len(other.split()) == len(words)
    assert shared(fingerprint(text), fingerprint(other)) < 8


@pytest.mark.skipif(not REPORT.is_file(), reason="make bench-prep has not been run: there is no report to compare with")
def test_readme_shows_the_report():
    assert tables(json.loads(REPORT.read_text(encoding="utf-8"))) in (ROOT / "prep" / "README.md").read_text(
        encoding="utf-8"
    )
