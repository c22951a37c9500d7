"""The benchmark of evaluation: FLOP as PyTorch counts them, the same figures as lm-eval's command, and README's table."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_curriculum import save_adapter, save_curriculum, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from bench import compare_with_lm_eval as bench
from prep.common import BadInput

ROOT = Path(__file__).parent.parent


def test_flop_are_those_that_pytorch_counts() -> None:
    """It counts attention to what stands behind too, as if the window were twice as long."""
    model = tiny_llama(vocabulary=500, seed=0, hidden=64)
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones((1, 96), dtype=torch.long))
    assert counter.get_total_flops() == pytest.approx(
        96 * bench.flop_per_token(model.config.to_dict(), 2 * 96), rel=0.01
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny curriculum, its adapters on a base in four bits."""
    folder = tmp_path / "place"
    folder.mkdir()
    save_curriculum(folder)
    monkeypatch.chdir(folder)
    size = len(AutoTokenizer.from_pretrained("models/base"))
    tiny_llama(size, seed=1, hidden=64).save_pretrained("outputs/2a")
    save_adapter(Path("outputs/2a"), Path("outputs/2b"), "outputs/2a", seed=2)
    recipe = Path("recipes/2b.yml")
    nf4 = {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | nf4))
    return folder


@pytest.mark.slow
def test_figures_are_those_of_lm_evals_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full model and an adapter on a base in four bits, both scored by `lm_eval run` itself."""
    Path("page.md").write_text("<!-- bench-eval:begin -->\n<!-- bench-eval:end -->\n")
    arguments = ["--stages", "2a", "2b", "--tasks", "novel_heldout", "--out", "eval.json", "--readme", "page.md"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench/compare_with_lm_eval.py"), *arguments])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bench.main()
    result = json.loads(Path("eval.json").read_text())
    assert set(result["stages"]) == set(result["lm_eval"]) == {"2a", "2b"}
    assert max(result["compared"]["differences"].values()) < 1e-4
    assert bench.table(result) in Path("page.md").read_text()
    assert result["stages"]["2a"]["bits_per_byte"] != result["stages"]["2b"]["bits_per_byte"]
    assert result["compared"]["seconds_ours"] > sum(stage["seconds"] for stage in result["stages"].values())
    assert all(0 <= share < 0.1 for share in result["padding"].values())

    before = bench.AGREE
    monkeypatch.setattr(bench, "AGREE", -1.0)
    monkeypatch.setattr(bench, "theirs", lambda *_: result["lm_eval"])
    with pytest.raises(BadInput, match="differ by"):
        bench.main()
    assert before == 1e-3


def test_the_page_says_what_the_committed_report_says() -> None:
    assert (
        f"begin -->\n{bench.table(json.loads(bench.REPORT.read_text()))}\n<!--" in (ROOT / "eval/README.md").read_text()
    )
