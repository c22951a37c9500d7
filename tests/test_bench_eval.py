"""The benchmark of evaluation: the same figures as lm-eval's command, and its page."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_curriculum import save_adapter, save_curriculum, tiny_llama
from transformers import AutoTokenizer

from bench import compare_with_lm_eval as bench
from prep.common import BadInput

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_figures_are_those_of_lm_evals_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full model and an adapter on a 4-bit base, both scored by `lm_eval run` itself."""
    save_curriculum(tmp_path)
    monkeypatch.chdir(tmp_path)
    size = len(AutoTokenizer.from_pretrained("models/base"))
    tiny_llama(size, seed=1, hidden=64).save_pretrained("outputs/2a")
    save_adapter(Path("outputs/2a"), Path("outputs/2b"), "outputs/2a", seed=2)
    recipe = Path("recipes/2b.yml")
    nf4 = {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | nf4))
    arguments = ["--stages", "2a", "2b", "--tasks", "novel_heldout", "--out", "eval.json"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench/compare_with_lm_eval.py"), *arguments])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bench.main()
    result = json.loads(Path("eval.json").read_text())
    assert set(result["stages"]) == set(result["lm_eval"]) == {"2a", "2b"}
    assert max(result["compared"]["differences"].values()) < 1e-4
    assert result["stages"]["2a"]["bits_per_byte"] != result["stages"]["2b"]["bits_per_byte"]
    assert result["compared"]["seconds_ours"] > sum(stage["seconds"] for stage in result["stages"].values())
    assert Path("eval.md").read_text() == bench.page(result)

    monkeypatch.setattr(bench, "theirs", lambda row, *_: {"seconds": 1.0, "bits_per_byte": {"novel_heldout": 9.0}})
    with pytest.raises(BadInput, match="differ by"):
        bench.main()


def test_the_committed_page_follows_from_the_json() -> None:
    report = ROOT / "bench/reports/eval.json"
    assert bench.page(json.loads(report.read_text())) == report.with_suffix(".md").read_text()
