"""The benchmark's arithmetic, and prep/README.md's tables against the committed report."""

import json
from pathlib import Path

from bench.prep_speed import growth, middle, on_paper, perturbed, tables
from eval.readme import fill, filled

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
    assert found == {
        "start_cpu_seconds": 17.5,
        "windows_a_cpu_second": 2400,
        "times_naive_a_core": 4.8,
        "cpu_seconds_a_mb": 0.25,
    }


def test_a_perturbed_book_is_another_on_the_same_pages():
    import random

    from prep.dedup import fingerprint, shared

    text = "\n".join(
        f"Le vieux pêcheur numéro {n} du port regardait la mer grise en silence.\nTITRE {n}" for n in range(900)
    )
    words = text.split()
    other = perturbed(text, random.Random(1))
    new = sum(word not in words for word in other.split())
    assert 0.01 * len(words) < new < 0.05 * len(words)
    assert other.count("\n") == text.count("\n") and "TITRE 7\n" in other and len(other.split()) == len(words)
    assert shared(fingerprint(text), fingerprint(other)) < 8


def test_the_middle_run_is_told():
    assert [middle([{"windows_a_second": n} for n in speeds])["windows_a_second"] for speeds in ([3, 1, 2], [9])] == [
        2,
        9,
    ]


def test_the_library_on_paper_follows_from_the_rates():
    report = {"bytes_a_word": 6.0, "tokens_a_word": 2.0, "growth": {"cpu_seconds_a_mb": 0.36}}
    told = on_paper(report)
    assert "98 GB" in told and "9.8 processor hours" in told  # 16.4e9 x 6 bytes, at 0.36 s a MB
    assert "0.6 h on one machine" in told and "2 minutes on 20 Slurm nodes" in told
    assert "1.02 G tokens are one part in 32" in told
    assert "19.7 processor hours" in on_paper(report | {"growth": {"cpu_seconds_a_mb": 0.72}})


def test_readme_shows_the_report(tmp_path):
    readme = ROOT / "prep" / "README.md"
    page = readme.read_text(encoding="utf-8")
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    assert page == filled(page, "speed", f"{tables(report)}\n"), (
        "python bench/prep_speed.py --again --readme prep/README.md"
    )
    copy = tmp_path / "README.md"
    copy.write_text(page, encoding="utf-8")
    report["sizes"][0]["ours"]["windows_a_second"] += 1
    fill(copy, "speed", f"{tables(report)}\n")
    assert copy.read_text(encoding="utf-8") != page


def test_every_kill_of_the_report_gave_the_same_bytes():
    path = REPORT.with_name("prep_kill.txt")
    first, *kills, last = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("undisturbed: ") and len(kills) == 20
    assert all(line.endswith("then: the same bytes") for line in kills) and last == "20 of 20 the same"
    assert last in (ROOT / "prep" / "README.md").read_text(encoding="utf-8")


def test_readme_shows_what_the_cleaning_scored():
    """Each command of the report with its last line, the sum over the books."""
    report = REPORT.with_name("prep_score.txt").read_text(encoding="utf-8")
    page = (ROOT / "prep" / "README.md").read_text(encoding="utf-8")
    runs = report.split("$ ")[1:]
    assert len(runs) == 3
    for run in runs:
        command, *_, total = run.strip().splitlines()
        assert total.startswith("all  ") and f"```\n$ {command}\n{total}\n```" in page
