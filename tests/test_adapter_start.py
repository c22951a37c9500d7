"""A new adapter starts as the correction of its base's quantisation error: the mathematics, and real 4 and 8 bits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_curriculum import tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prep.common import BadInput
from train.adapter_start import StartAdapter, calibration_rows, correct, low_rank, root_of_moments, unquantised
from train.dequantise import dequantised, merge

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(300, seed=0, hidden=128).save_pretrained(folder)
    return folder


def quantised(folder: Path, rank: int, settings: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules="all-linear"))


def rows(count: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randint(300, (length,)) for length in range(60, 60 + count)]


def test_no_product_of_that_rank_is_nearer_on_the_inputs() -> None:
    """Against QERA's own form: the SVD of E R^(1/2), with R the inputs' second moments."""
    torch.manual_seed(0)
    error = torch.randn(48, 32)
    inputs = torch.randn(200, 32) @ torch.diag(torch.logspace(0, -2, 32)) @ torch.randn(32, 32)
    b, a, left = low_rank(error, root_of_moments(inputs, damping=0), 8)
    moments = inputs.T @ inputs / len(inputs)
    values, vectors = torch.linalg.eigh(moments.double())
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    spectrum = torch.linalg.svdvals(error.double() @ root).square()
    assert left == pytest.approx((spectrum[8:].sum() / spectrum.sum()).item(), rel=0.01)
    whole, missed = (error @ inputs.T).square().sum(), ((error - b @ a) @ inputs.T).square().sum()
    assert left == pytest.approx((missed / whole).item(), rel=1e-3)
    plain = torch.linalg.svd(error)
    loftq = plain.U[:, :8] * plain.S[:8] @ plain.Vh[:8]
    assert missed < 0.5 * ((error - loftq) @ inputs.T).square().sum()


@pytest.mark.parametrize("inputs", [torch.zeros(5, 16), torch.ones(1, 16), 1e-20 * torch.ones(5, 16)])
@pytest.mark.parametrize("error", [torch.zeros(16, 16), torch.eye(16)])
def test_inputs_that_say_little_give_numbers(error: torch.Tensor, inputs: torch.Tensor) -> None:
    b, a, left = low_rank(error, root_of_moments(inputs), 4)
    assert torch.isfinite(b).all() and torch.isfinite(a).all() and 0 <= left <= 1


@pytest.mark.parametrize(
    ("settings", "corrected", "nearer"),
    [(NF4, 14, 3), ({"load_in_8bit": True}, 14, 1.5), (NF4 | {"llm_int8_skip_modules": ["lm_head", "v_proj"]}, 12, 3)],
    ids=["nf4", "8-bit", "v_proj in 16 bits"],
)
@torch.no_grad()
def test_the_corrected_model_is_nearer_to_the_unquantised_and_merges_exactly(
    base: Path, settings: dict, corrected: int, nearer: float
) -> None:
    ids = torch.stack([row[:60] for row in rows()])
    target = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    model = quantised(base, 64, settings)
    before = (model(ids).logits - target).square().mean()
    with torch.autocast("cpu", torch.bfloat16):  # as Axolotl's `bf16: true` trains
        said = correct(model, unquantised(str(base)), rows())
    trained = model(ids).logits
    after = (trained - target).square().mean()
    assert f"{corrected} quantised layers corrected on {sum(map(len, rows()))} tokens" in said
    assert after * nearer < before, f"{before} -> {after}"
    full = merge(model, AutoModelForCausalLM.from_pretrained(base))  # into the quantised weights, not these
    wrong = model.merge_and_unload()  # PEFT quantises again
    assert (full(ids).logits - trained).abs().max() < 0.05 * (wrong(ids).logits - trained).abs().max()


def test_a_layer_that_computes_with_other_weights_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a kernel of bitsandbytes keeps the weights in a layout that `dequantize_4bit` does not know."""
    monkeypatch.setattr("train.adapter_start.dequantised", lambda layer: dequantised(layer).roll(1, dims=1))
    with pytest.raises(BadInput, match=r"computes model.layers.0.self_attn.q_proj with other weights"):
        correct(quantised(base, 64, NF4), unquantised(str(base)), rows())


def test_more_rank_than_the_layer_has(base: Path) -> None:
    model = quantised(base, 200, NF4)  # k_proj is 64 x 128
    correct(model, unquantised(str(base)), rows())
    layer = model.get_base_model().model.layers[0].self_attn.k_proj
    assert layer.lora_B["default"].weight[:, 64:].abs().max() == 0 < layer.lora_B["default"].weight[:, :64].abs().min()


def test_rows_are_drawn_by_the_seed() -> None:
    data = [{"input_ids": [n] * 10} for n in range(50)]

    def drawn(seed: int, tokens: int = 35) -> list[list[int]]:
        return [row.tolist() for row in calibration_rows(data, seed, tokens)]

    assert drawn(42) == drawn(42) != drawn(43) and len(drawn(42)) == 4
    assert len(drawn(42, 10_000)) == 50  # all there are


@pytest.mark.parametrize(
    "change", [{"lora_model_dir": "outputs/2b"}, {"output_dir": "resumed"}, {"load_in_4bit": False}], ids=str
)
def test_what_is_left_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, change: dict
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("resumed/checkpoint-2").mkdir(parents=True)
    cfg = {"adapter": "qlora", "lora_model_dir": None, "output_dir": "new", "load_in_4bit": True, "load_in_8bit": None}
    model = quantised(base, 4, NF4)
    StartAdapter().post_lora_load(SimpleNamespace(**cfg | change), model)
    assert all(value.abs().max() == 0 for name, value in model.named_parameters() if "lora_B" in name)
    assert ("not quantised" in capsys.readouterr().out) == ("load_in_4bit" in change)
