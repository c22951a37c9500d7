"""The arithmetic of bench/prep_speed.py."""

import random

from bench.prep_speed import growth, perturbed
from prep.dedup import fingerprint, shared


def test_growth_leaves_the_start_of_programs_out():
    def size(mb: float, windows: int, seconds: float) -> dict:
        ours = {"windows": windows, "cpu_seconds": seconds}
        return {"text_mb": mb, "ours": ours, "naive": {"windows_a_cpu_second": 500}}

    assert growth([size(10, 6_000, 20), size(30, 18_000, 26), size(50, 30_000, 30)]) == {
        "start_cpu_seconds": 17.5,
        "windows_a_cpu_second": 2400,
        "times_naive_a_core": 4.8,
        "cpu_seconds_a_mb": 0.25,
    }


def test_a_perturbed_book_is_another_on_the_same_pages():
    lines = (f"Le vieux pêcheur numéro {n} du port regardait la mer en silence.\nTITRE {n}" for n in range(900))
    text = "\n".join(lines)
    words, other = text.split(), perturbed(text, random.Random(1))
    assert 0.01 * len(words) < sum(word not in words for word in other.split()) < 0.05 * len(words)
    assert other.count("\n") == text.count("\n") and "TITRE 7\n" in other and len(other.split()) == len(words)
    assert shared(fingerprint(text), fingerprint(other)) < 8
