"""The planner's arithmetic against what can be had without a GPU: real modules, real optimisers, real 4-bit weights,
what autograd really saves, and torch's own memory tracker on a simulated training step."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_curriculum import call_main
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, PreTrainedModel

from prep.common import ROOT, BadInput
from train import memory as planner
from train.memory import GIB, Tensors, build, fits, load_config, on_cards, optimizer_state, plan, remedy
from train.stage import load_profile
from train.stages import load_recipe, share_step

TINYLLAMA = load_config(ROOT / "train/tinyllama.json")
RECIPES = {path.stem: load_recipe(path) for path in sorted((ROOT / "recipes").glob("*.yml"))}
FULL: dict[str, Any] = {
    "bf16": True, "micro_batch_size": 4, "gradient_accumulation_steps": 2, "sequence_len": 512,
    "optimizer": "adamw_torch_fused", "attn_implementation": "sdpa", "gradient_checkpointing": True,
}  # fmt: skip
LORA = FULL | {"adapter": "lora", "lora_r": 16, "lora_alpha": 16, "lora_target_linear": True}


def llama(**changes: Any) -> LlamaConfig:
    """TinyLlama's proportions, smaller."""
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = LlamaConfig(**(sizes | heads | {"use_cache": False} | changes))
    config._attn_implementation = "sdpa"
    return config


def as_axolotl_loads_it(config: LlamaConfig, recipe: dict[str, Any]) -> PreTrainedModel:
    """Layers in bf16; embeddings, head and norms as `embeddings_width` says; adapters in fp32. All weights are zero."""
    model = build(config, recipe)
    model.enable_input_require_grads()
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            outer = name.endswith(("norm", "embed_tokens", "lm_head")) and planner.embeddings_width(recipe) == 4
            dtype = torch.float32 if outer or "lora_" in name else torch.bfloat16
            zeros = torch.zeros(parameter.shape, dtype=dtype)
            if parameter.requires_grad:
                setattr(module, key, torch.nn.Parameter(zeros))
            else:  # the tracker below expects a gradient of every parameter; a frozen one is as good as a buffer
                delattr(module, key)
                module.register_buffer(key, zeros)
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, key, torch.zeros(buffer.shape))
    return model.train()


# --- what is counted ----------------------------------------------------------------------------------------------


def test_parameters_are_those_of_tinyllama_and_of_an_adapter_of_its_rank() -> None:
    counted = sum(sum(kind.elements) for kind in planner.tensors(build(TINYLLAMA, FULL), FULL))
    assert counted == 1_100_048_384  # of TinyLlama v1.1's safetensors
    recipe = RECIPES["2b"]
    (adapter,) = (kind for kind in planner.tensors(build(TINYLLAMA, recipe), recipe) if kind.trained)
    h, i, k, r = 2048, 5632, 256, recipe["lora_r"]
    assert sum(adapter.elements) == 22 * r * (2 * (h + h) + 2 * (h + k) + 3 * (h + i)) and adapter.kind == "adapter"


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch_8bit", "adamw_8bit"])
def test_optimiser_states_are_those_of_the_real_optimiser(name: str) -> None:
    """Every tensor of the state; a norm and an odd length are among the parameters."""
    import bitsandbytes
    import torchao

    embedding = torch.nn.Embedding(1000, 256)
    kinds, parameters = [], []
    for kind, shape in {"matrix": (512, 704), "embedding": (1000, 256), "norm": (256,), "head": (77, 61)}.items():
        dtype = torch.bfloat16 if kind == "matrix" else torch.float32
        kinds.append(Tensors(kind, (torch.Size(shape).numel(),), dtype.itemsize, True))
        new = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameters.append(embedding.weight if kind == "embedding" else new)
        parameters[-1].grad = torch.zeros_like(parameters[-1])
    optimizer: Any
    if name == "adamw_torch_fused":
        optimizer = torch.optim.AdamW(parameters, fused=True)
        optimizer.step()
    elif name == "adamw_torch_8bit":
        optimizer = torchao.optim.AdamW8bit(parameters)
        for parameter in parameters:  # the state that a step would make, without compiling the step
            optimizer.state[parameter]["exp_avg"] = optimizer._new_buffer(parameter, True)
            optimizer.state[parameter]["exp_avg_sq"] = optimizer._new_buffer(parameter, False)
    else:  # likewise, and the embedding as Transformers registers it
        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        manager.register_module_override(embedding, "weight", {"optim_bits": 32})
        optimizer = bitsandbytes.optim.AdamW8bit(parameters)
        optimizer.check_overrides()
        for index, parameter in enumerate(parameters):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)

    def held(value: Any) -> int:
        if hasattr(value, "__tensor_flatten__"):  # a quantised tensor of torchao: codes, scales, table
            return sum(held(getattr(value, part)) for part in value.__tensor_flatten__()[0])
        return value.nbytes if torch.is_tensor(value) and value.dim() else 0

    shared = {"qmap1", "qmap2"}  # bitsandbytes' code tables serve all tensors
    real = sum(held(value) for state in optimizer.state.values() for key, value in state.items() if key not in shared)
    assert optimizer_state(name, kinds) == pytest.approx(real, rel=0.01)


def test_copies_of_embeddings_are_counted_as_trained_or_frozen() -> None:
    """What full copies of both embeddings of an 8 B Llama, vocabulary of 128,256, add to its weights and optimiser."""
    llama_8b = load_config(ROOT / "train/instruct-8b.json")
    trained, frozen, none = (plan(llama_8b, RECIPES[name]) for name in ("3a", "3b", "3c"))
    copies = 2 * 128_256 * 4096
    assert trained.adapter == frozen.adapter == pytest.approx(none.adapter + 2 * copies)  # bf16
    assert trained.all_gradients == pytest.approx(none.all_gradients + 2 * copies)
    assert frozen.all_gradients == none.all_gradients and frozen.optimizer == none.optimizer
    assert trained.optimizer == pytest.approx(none.optimizer + 2 * copies * (1 + 4 / 256), rel=1e-3)  # 8 bits
    tied = llama(tie_word_embeddings=True, vocab_size=1024)
    assert plan(tied, RECIPES["3a"]).adapter == pytest.approx(plan(tied, RECIPES["3c"]).adapter + 2 * 1024 * 256)


@pytest.mark.parametrize("double", [True, False])
def test_nf4_takes_what_bitsandbytes_makes_of_a_weight(double: bool) -> None:
    import bitsandbytes

    weight = torch.randn(2048, 5632)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    real = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    recipe = {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": double}}
    assert planner.quantised_width(recipe) * weight.numel() == pytest.approx(real, rel=0.001)


# --- activations --------------------------------------------------------------------------------------------------


def simulated_peak(config: LlamaConfig, recipe: dict[str, Any]) -> float:
    """Peak bytes of two micro-steps, by torch's tracker on tensors that have shapes and no storage; no optimiser."""
    shape = (recipe["micro_batch_size"], recipe["sequence_len"])
    with FakeTensorMode():
        model = as_axolotl_loads_it(config, recipe)
        if recipe.get("gradient_checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.zeros(shape, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(
    ("recipe", "checkpointing", "vocabulary"),
    [(FULL, True, 32000), (LORA, True, 512), (FULL, False, 512)],
    ids=["full-checkpointed-loss", "lora-checkpointed-layers", "full-kept-layers"],
)
def test_the_peak_is_the_simulated_one(recipe: dict[str, Any], checkpointing: bool, vocabulary: int) -> None:
    config = llama(
        vocab_size=vocabulary, hidden_size=2048, intermediate_size=5632, num_hidden_layers=3,
        num_attention_heads=32, num_key_value_heads=4,
    )  # fmt: skip
    recipe = recipe | {"gradient_checkpointing": checkpointing}
    planned, simulated = plan(config, recipe), simulated_peak(config, recipe)
    static = planned.weights + planned.adapter + planned.gradients
    assert planned.moment == ("loss" if vocabulary == 32000 else "last layer's backward")
    assert planned.peak - planned.optimizer == pytest.approx(simulated, rel=0.10)
    assert planned.activations + planned.logits == pytest.approx(simulated - static, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipes/2a.yml", "recipes/2b.yml", "bench/kafka/2a.yml"])
def test_axolotl_loads_weights_as_wide_as_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axolotl_validates: Any
) -> None:
    """Axolotl's own loader, told that there is a GPU of Ampere's kind, on a CPU without Liger's kernels."""
    from axolotl.loaders import ModelLoader, load_tokenizer
    from axolotl.utils.config import normalize_config
    from small_tokenizers import save_llama_like
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaAttention

    # Axolotl's LoRA kernels replace this for the whole process; what is set here is put back at the end.
    monkeypatch.setattr(LlamaAttention, "forward", LlamaAttention.forward)
    monkeypatch.chdir(tmp_path)
    save_llama_like(tmp_path / "models/base")
    LlamaForCausalLM(llama(vocab_size=3200)).bfloat16().save_pretrained(tmp_path / "models/base")
    said = load_recipe(ROOT / name)
    recipe = {key: value for key, value in said.items() if not key.startswith(("liger_", "plugins"))}
    cfg: Any = axolotl_validates(recipe | {"base_model": "models/base"})
    cfg.torch_dtype = torch.bfloat16
    normalize_config(cfg)
    cfg.torch_dtype, cfg.device, cfg.device_map = torch.bfloat16, "cpu", None
    model, _ = ModelLoader(cfg, load_tokenizer(cfg)).load()

    def widths(*marks: str) -> set[int]:
        return {value.element_size() for key, value in model.named_parameters() if any(mark in key for mark in marks)}

    assert widths("embed", "lm_head") == widths("norm") == {planner.embeddings_width(recipe)}
    assert widths("lora_") == ({4} if recipe.get("adapter") else set())
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert all("lora_" in key for key in trained) if recipe.get("adapter") else len(trained) == 21


# --- what is made of it ----------------------------------------------------------------------------------------------


def test_the_shipped_recipes_fit_a_12_gb_card_by_what_they_save() -> None:
    assert all(fits(plan(TINYLLAMA, recipe), 12) for recipe in RECIPES.values())
    fused, unfused = RECIPES["2a"], RECIPES["2a"] | {"liger_fused_linear_cross_entropy": False}
    changed = (fused, unfused | {"chunked_cross_entropy": True}, unfused, fused | {"gradient_checkpointing": False})
    shipped, chunked, plain, kept = (plan(TINYLLAMA, recipe).peak for recipe in changed)
    assert shipped < chunked < plain - 0.5 * GIB and plain - shipped > 1.5 * GIB and kept - shipped > 8 * GIB


def test_a_remedy_makes_it_fit() -> None:
    """The line is YAML: putting it into the recipe must do what it promises, and change no more than needed."""
    recipe = RECIPES["2a"] | {"micro_batch_size": 64, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    assert not fits(plan(TINYLLAMA, recipe), 12)
    changes: dict[str, Any] = {}
    for change in remedy(TINYLLAMA, recipe, 12).split(", "):
        changes |= yaml.safe_load(change)
    changed = recipe | changes
    assert fits(plan(TINYLLAMA, changed), 12)
    assert changed["micro_batch_size"] * changed["gradient_accumulation_steps"] == 64
    assert not fits(plan(TINYLLAMA, changed | {"micro_batch_size": 2 * changed["micro_batch_size"]}), 12)
    assert remedy(TINYLLAMA, RECIPES["2a"], 4).startswith("does not fit: ")


def test_a_7b_on_eight_cards_is_what_a_hand_counts() -> None:
    """Llama 2 7B: 6,738,415,616 weights, all trained, by FSDP2."""
    llama_7b = llama(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    )  # fmt: skip
    recipe = RECIPES["2a"] | load_profile("fsdp", "2a")[1]
    share_step(recipe, 8)
    assert recipe["micro_batch_size"] == 4  # of 2a's 32 rows
    share, layer = 6_738_415_616 / 8, 4 * 4096**2 + 3 * 4096 * 11008
    whole = 4 * (2 * 32000 * 4096 + 2 * layer)  # weight and gradient in bf16: both embeddings, two layers
    planned = plan(llama_7b, recipe, 8)
    assert planned.weights == pytest.approx(2 * share + whole, rel=1e-3)
    assert planned.all_gradients == pytest.approx(2 * share, rel=1e-3)
    assert planned.optimizer == pytest.approx(2 * (1 + 4 / 256) * share, rel=1e-3)
    assert planned.activations == plan(llama_7b, recipe, 1).activations  # each card has its own
    assert fits(planned, 12) and not fits(planned, 8)
    shared = [on_cards(llama_7b, RECIPES["2a"], card) for card in (4, 12, 16, 24)]
    assert shared == [None, 8, 4, 2]
    assert "; take 8 such cards (PROFILE=fsdp), or train an adapter" in remedy(llama_7b, RECIPES["2a"], 12)
    assert "take a smaller base, or a card of 12 GB: each of several" in remedy(llama_7b, RECIPES["2b"], 8)


@pytest.mark.parametrize("change", [{"bf16": False}, {"optimizer": "muon"}])
def test_a_recipe_it_cannot_plan_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="|".join(change)):
        plan(TINYLLAMA, RECIPES["2a"] | change)


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    call_main(planner, ROOT / "recipes/2a.yml")
    said = re.sub(" +", " ", capsys.readouterr().out)
    peak = plan(TINYLLAMA, RECIPES["2a"]).peak / GIB
    for line in (f"| **planned peak, allocator** | {peak:.2f} |", "| fits in 12 GB | yes |", "| fits in 8 GB | no |"):
        assert line in said
    assert "recipes/2a.yml in 8 GB: does not fit: " in said
