"""The benchmark of evaluation: the same figures as lm-eval's command, and its page."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_curriculum import save_adapter, tiny_llama
from transformers import AutoTokenizer

from bench import compare_with_lm_eval as bench
from prep.common import BadInput

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_figures_are_those_of_lm_evals_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter on a 4-bit base, scored by `lm_eval run` itself; with no tolerance left, the rounding is refused."""
    size = len(AutoTokenizer.from_pretrained("models/base"))
    tiny_llama(size, seed=1, hidden=64).save_pretrained("outputs/2a")
    save_adapter(Path("outputs/2a"), Path("outputs/2b"), "outputs/2a", seed=2)
    recipe = Path("recipes/2b.yml")
    nf4 = {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | nf4))
    arguments = ["--stages", "2b", "--tasks", "novel_heldout", "--out", "eval.json"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench/compare_with_lm_eval.py"), *arguments])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(bench, "AGREE", -1)
    with pytest.raises(BadInput, match="differ by"):
        bench.main()
    result = json.loads(Path("eval.json").read_text())
    assert set(result["stages"]) == set(result["lm_eval"]) == {"2b"}
    assert max(result["compared"]["differences"].values()) < 1e-4
    assert result["compared"]["seconds_ours"] > result["stages"]["2b"]["seconds"]
    assert Path("eval.md").read_text() == bench.page(result)


def test_the_committed_page_follows_from_the_json() -> None:
    report = ROOT / "bench/reports/eval.json"
    assert bench.page(json.loads(report.read_text())) == report.with_suffix(".md").read_text()
