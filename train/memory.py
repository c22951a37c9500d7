"""Will a recipe fit on a card? Plans a training's memory from the base's config.json and the recipe, without a GPU.

Parameters are counted on the real model and adapter (torch's meta device); the rest is arithmetic, a function for each
part, with its source. Everything printed is planned; `make bench-gpu` measures.

  python train/memory.py                                   the shipped recipes, on TinyLlama, Llamas of 1 to 8 B and Mistral 7B
  python train/memory.py --base models/base                on another base (a folder, or its config.json)
  python train/memory.py bench/kafka/2a.yml                other recipes
  python train/memory.py --base train/mistral-7b.json recipes/2a.yml       how many cards for every weight of a 7B

The peak is at one of three moments: the loss (every checkpoint, and the logits), the backward pass of the last layer
(every checkpoint and one layer's activations; without checkpointing every layer's), and the end of the backward pass
(every gradient). Known are Llama's kind of layer (RMSNorm, grouped attention, gated MLP), trained in bf16.

Several cards: `PROFILE=fsdp` divides weights, gradients and moments among them, and each has activations of its own.
Under `PROFILE=ddp` each holds everything: it is for speed, and a recipe that does not fit one card does not fit several.
"""

from prep.command import run

import argparse
import functools
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything read is a local file

import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prep.common import ROOT, BadInput
from train.gate import COPIES, COPY, is_frozen
from train.stage import load_profile
from train.stages import load_recipe, share_step

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
RESERVED = 1.0 * GIB  # assumed: what driver and desktop take
CUDA_CONTEXT = 0.74 * GIB  # context and cuBLAS workspaces, on an H100 (bench/reports/gpu.md: driver less reserved)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIMIZERS = {
    "adamw_torch": "full", "adamw_torch_fused": "full", "adamw_torch_8bit": "torchao",
    "adamw_8bit": "bitsandbytes", "adamw_bnb_8bit": "bitsandbytes",
}  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """One kind of parameter: the number of elements of each tensor, bytes per element, whether it is trained."""

    # matrix, embedding, head, norm, adapter, copy or frozen copy (of an embedding or head, beside an adapter)
    kind: str
    elements: tuple[int, ...]
    width: float
    trained: bool

    @property
    def bytes(self) -> float:
        return sum(self.elements) * self.width


@dataclass(frozen=True)
class Plan:
    """Planned bytes of one recipe on one base."""

    weights: float
    adapter: float
    gradients: float  # at the peak
    all_gradients: float  # at the end of a step
    optimizer: float
    activations: float  # at the peak
    logits: float  # at the peak, with their gradient and what the loss works with
    peak: float  # of torch's allocator
    moment: str  # of the peak

    @property
    def card(self) -> float:
        """The peak with CUDA's own share."""
        return self.peak + CUDA_CONTEXT


@functools.cache
def load_config(base: Path) -> PretrainedConfig:
    """config.json of a model folder, or that file. Raises BadInput when it is missing or not a Llama-like model."""
    path = base / "config.json" if base.is_dir() else base
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(said.pop("model_type"), **said)
    except OSError as error:
        raise BadInput(f"{path} is missing; `make base` collects a base model, or name another with --base") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{path} is not a config.json of a Transformers model: {error}") from error
    names = {name.rsplit(".", 1)[-1] for name, _ in build(config, {}).named_modules()}
    if not names.issuperset(LINEARS):
        raise BadInput(f"{path}: the planner knows Llama's kind of layer; {config.model_type} has another")
    return config


def build(config: PretrainedConfig, recipe: dict[str, Any]) -> PreTrainedModel:
    """The model, with the recipe's adapter if it has one, on the meta device: shapes without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return with_adapter(model, recipe) if recipe.get("adapter") else model


def with_adapter(model: PreTrainedModel, recipe: dict[str, Any]) -> Any:
    """A new LoRA adapter, as Axolotl makes it of the same keys."""
    settings = LoraConfig(
        r=recipe["lora_r"],
        lora_alpha=recipe["lora_alpha"],
        lora_dropout=recipe.get("lora_dropout", 0.0),
        use_rslora=bool(recipe.get("peft_use_rslora")),
        target_modules="all-linear" if recipe.get("lora_target_linear") else recipe["lora_target_modules"],
        modules_to_save=recipe.get(COPIES),
        ensure_weight_tying=bool(recipe.get("peft_ensure_weight_tying")),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def quantised_width(recipe: dict[str, Any]) -> float:
    """Bytes per weight of the layers' matrices.

    NF4: half a byte, and a scale per block of 64: fp32, or with double quantisation one byte and an fp32 per 256 of
    them (Dettmers et al. 2023, QLoRA, section 3). LLM.int8: a byte (its scales, an fp32 per row, are left out).
    """
    if recipe.get("load_in_4bit"):
        double = (recipe.get("bnb_config_kwargs") or {}).get("bnb_4bit_use_double_quant")
        return 0.5 + (1 / 64 + 4 / (64 * 256) if double else 4 / 64)
    return 1 if recipe.get("load_in_8bit") else 2


def trains(recipe: dict[str, Any], module: str) -> bool:
    """Is the embedding (`model.embed_tokens`) or the head (`lm_head`) trained, itself or a full copy of it?"""
    if not recipe.get("adapter"):
        return True
    name = f"base_model.model.{module}{COPY}"
    return module.rsplit(".", 1)[-1] in (recipe.get(COPIES) or []) and not is_frozen(name, recipe)


def embeddings_width(recipe: dict[str, Any]) -> int:
    """Bytes per weight of embeddings, head and norms, and so per element of the residual stream.

    Axolotl raises them to fp32 except for adapters, under FSDP, and for attention that needs half precision
    (axolotl/loaders/model.py, `_configure_embedding_dtypes`): `bf16: true` with sdpa leaves them in fp32.
    """
    half = (
        recipe.get("adapter")
        or recipe.get("fsdp_config")
        or recipe.get("attn_implementation") not in (None, "sdpa", "eager")
    )
    return 2 if half else 4


def tensors(model: PreTrainedModel, recipe: dict[str, Any]) -> list[Tensors]:
    """Every parameter by kind, as wide as Axolotl holds it.

    Adapters are fp32 (PEFT, `autocast_adapter_dtype`), full copies beside them as wide as what they copy.
    """
    kept = (recipe.get("bnb_config_kwargs") or {}).get("llm_int8_skip_modules") or []
    marks = {"lora_": "adapter", "norm": "norm", "embed_tokens": "embedding", "lm_head": "head"}
    marks |= {name: "16-bit matrix" for name in kept if name not in marks} | {"": "matrix"}
    found: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        kind = next(kind for mark, kind in marks.items() if mark in name)
        if ".modules_to_save." in name:
            kind = "frozen copy" if is_frozen(name, recipe) else "copy"
        found.setdefault(kind, []).append(parameter.numel())
    width: dict[str, float] = {"adapter": 4, "matrix": quantised_width(recipe)}
    trained = {"adapter", "copy"} if recipe.get("adapter") else set(found)
    return [
        Tensors(kind, tuple(sizes), width.get(kind, embeddings_width(recipe)), kind in trained)
        for kind, sizes in found.items()
    ]


def optimizer_state(optimizer: str, kinds: Iterable[Tensors]) -> float:
    """Bytes of both moments of Adam, which have the width of the weights unless they are kept in 8 bits.

    8 bits: a code per element, an fp32 scale per block of 256. torchao (torchao/optim/adam.py, `_new_buffer`) leaves
    tensors below 4,096 elements, or of a length that is not a multiple of 256, as they are, and keeps a table of 256
    fp32 per tensor. bitsandbytes leaves those below 4,096 in fp32, and every nn.Embedding with them
    (transformers/trainer.py, `register_module_override`), but for a copy with its own `embedding_lr`.
    """
    if optimizer not in OPTIMIZERS:
        raise BadInput(f"the planner does not know optimizer {optimizer}; it knows {', '.join(OPTIMIZERS)}")
    made_by = OPTIMIZERS[optimizer]
    total = 0.0
    for kind in kinds:
        for elements in kind.elements if kind.trained else ():
            coded = elements * (1 + 4 / 256)
            if made_by == "torchao" and elements >= 4096 and elements % 256 == 0:
                total += 2 * (coded + 256 * 4)
            elif made_by == "bitsandbytes":
                total += 2 * (coded if elements >= 4096 and kind.kind != "embedding" else elements * 4)
            else:
                total += 2 * elements * kind.width
    return total


def layer_activations(config: PretrainedConfig, recipe: dict[str, Any]) -> float:
    """Bytes per token that one layer's forward pass saves for its backward pass, its own input included.

    Counted on what autograd keeps (transformers/models/llama/modeling_llama.py under bf16 autocast, liger_kernel/ops,
    axolotl/kernels/lora.py), by the method of Korthikanti et al. 2022, Reducing Activation Recomputation. With h, i, q, k
    the widths of the residual stream, the MLP, the queries and the keys:

      norms      twice: Liger keeps the input; Transformers an fp32 copy, and the scaled input if the norm is trained
      inputs     of q, k, v and of gate, up: autocast makes a bf16 copy for each linear of an fp32 input; a bf16
                 input is shared, unless PEFT casts it for each adapter; with LoRA kernels it is shared again
      attention  queries, keys, values, output in bf16, an fp32 log-sum per head
      MLP        gate and up; unfused also silu(gate); and the input of `down` unless the LoRA kernel recomputes it
    """
    h, i, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or h // heads
    q, k = heads * head, config.num_key_value_heads * head
    adapter, residual = bool(recipe.get("adapter")), embeddings_width(recipe)
    per_linear = residual == 4 or (adapter and not recipe.get("lora_qkv_kernel"))
    per_mlp_linear = residual == 4 or (adapter and not recipe.get("lora_mlp_kernel"))

    if recipe.get("liger_rms_norm"):
        norms = 2 * (residual * h + 4)
    else:
        norms = 2 * (4 * h + 4 + (0 if adapter else residual * h))
    inputs = 2 * h * ((3 if per_linear else 1) + (2 if per_mlp_linear else 1))
    attention = 2 * (2 * q + 2 * k) + 4 * heads
    if adapter and not recipe.get("lora_o_kernel"):
        attention += 2 * q  # PEFT's cast of the input of o_proj
    if adapter and recipe.get("lora_mlp_kernel"):
        mlp = 2 * 2 * i
    elif recipe.get("liger_glu_activation"):
        mlp = 2 * 3 * i
    else:
        mlp = 2 * 4 * i
    rank = 2 * recipe["lora_r"] * len(LINEARS) if adapter and not recipe.get("lora_mlp_kernel") else 0
    # An input that Transformers' norm copies to fp32 is not itself saved, but the checkpoint keeps it.
    own_input = residual * h if residual == 2 and not recipe.get("liger_rms_norm") else 0
    return norms + inputs + attention + mlp + rank + own_input


def layer_backward(config: PretrainedConfig, recipe: dict[str, Any]) -> float:
    """Bytes per token of the gradients alive in the middle of a layer's backward pass.

    That of the residual stream, and in the MLP those of the input of `down`, of gate and of up, in bf16. Without the LoRA
    kernel, PEFT casts the input of `down` to fp32: the cast, its gradient, and that in bf16 are added.
    """
    h, i = config.hidden_size, config.intermediate_size
    casts = 6 * i if recipe.get("adapter") and not recipe.get("lora_mlp_kernel") else 0
    return embeddings_width(recipe) * h + 2 * 3 * i + casts


def loss_memory(config: PretrainedConfig, recipe: dict[str, Any], tokens: int) -> float:
    """Bytes at the loss: the final norm, a head in fp32 cast to bf16, and the logits with what is made of them.

    Plain: the fp32 log-softmax, its gradient and the logits' gradient, 12 bytes per token and word.
    Chunked (axolotl/monkeypatch/loss/chunked.py): bf16 logits and their gradient, 4 bytes, and a chunk of an eighth in fp32.
    Preferences (trl/experimental/orpo/orpo_trainer.py): fp32 logits and their gradient, 8 bytes, and for the own loss of
    the half that is chosen five fp32 copies, 20 bytes.
    Liger fused (liger_kernel/ops/fused_linear_cross_entropy.py): bf16 chunks of next_power_of_2(tokens / (V / h)) tokens,
    the gradient of the hidden states, and that of the head if it is trained.
    """
    h, v, residual = config.hidden_size, config.vocab_size, embeddings_width(recipe)
    head_cast = 2 * v * h if residual == 4 else 0
    norm = tokens * h * (residual + (0 if recipe.get("liger_rms_norm") else 4) + 2)
    if recipe.get("rl"):
        return norm + head_cast + 18 * tokens * v
    if recipe.get("liger_fused_linear_cross_entropy"):
        rows = -(-tokens // -(-v // h))
        chunk = 1 << (rows - 1).bit_length()
        gradients = residual * h * tokens + (residual * v * h if trains(recipe, "lm_head") else 0)
        return norm + head_cast + gradients + 2 * chunk * v
    if recipe.get("chunked_cross_entropy"):
        return norm + head_cast + 4 * tokens * v + 2 * 4 * tokens * v / 8
    return norm + head_cast + 12 * tokens * v


def check_planned(recipe: dict[str, Any]) -> None:
    """Raises BadInput on what the arithmetic here does not cover."""
    for key in ("micro_batch_size", "gradient_accumulation_steps", "sequence_len", "lora_r", "lora_alpha"):
        if not isinstance(recipe.get(key, 0), int):
            raise BadInput(f"{key} must be a whole number, not {recipe[key]!r}")
    if recipe.get("bf16") not in (True, "auto"):
        raise BadInput(f"the planner counts a training in bf16; the recipe says `bf16: {recipe.get('bf16')}`")
    uncounted = ("activation_offloading", "layer_offloading", "selective_checkpointing", "torch_compile")
    for key in (*uncounted, "unfrozen_parameters", "peft_use_dora"):
        if recipe.get(key) and not (key == "unfrozen_parameters" and recipe.get("adapter")):
            raise BadInput(f"the planner does not count what `{key}` does to memory; `make bench-gpu` measures it")


def gathered(config: PretrainedConfig, kinds: list[Tensors]) -> float:
    """Bytes that each card of FSDP2 holds whole for a while, in bf16: weights and their gradients, before they are shared out.

    Embedding, head and last norm are one group, each layer another; the next one is gathered while one is in use
    (torch/distributed/fsdp/_fully_shard).
    """
    layers = sum(sum(kind.elements) for kind in kinds if kind.kind in ("matrix", "16-bit matrix"))
    outer = sum(sum(kind.elements) for kind in kinds if kind.kind in ("embedding", "head"))
    return 2 * 2 * (outer + 2 * layers / config.num_hidden_layers)


def plan(config: PretrainedConfig, recipe: dict[str, Any], cards: int = 1) -> Plan:
    """What one recipe takes on one base, at its peak, in bytes; of each of `cards` that share it by FSDP2.

    Shared are weights, moments, and gradients too if a step is one micro-step: from one to the next FSDP2 keeps them whole
    (`no_sync` in accelerate/accelerator.py).
    """
    check_planned(recipe)
    kinds = tensors(build(config, recipe), recipe)
    tokens = recipe["micro_batch_size"] * recipe["sequence_len"]  # packed or not, a micro-step has them all
    if recipe.get("rl"):
        tokens *= 2  # chosen and rejected together; a reference, where there is one, is the adapter switched off
    layers, width = config.num_hidden_layers, embeddings_width(recipe) * config.hidden_size
    layer = layer_activations(config, recipe)
    if recipe.get("gradient_checkpointing"):
        kept, top = layers * width * tokens, (layer - width + layer_backward(config, recipe)) * tokens
    else:
        kept, top = layers * layer * tokens, layer_backward(config, recipe) * tokens
    if quantised_width(recipe) < 2:
        top += 2 * config.hidden_size * config.intermediate_size  # the matrix in use, back in bf16
    adapter = sum(kind.bytes for kind in kinds if kind.kind in ("adapter", "copy", "frozen copy"))
    weights = sum(kind.bytes for kind in kinds) - adapter
    gradients = sum(kind.bytes for kind in kinds if kind.trained)
    states = optimizer_state(recipe["optimizer"], kinds)
    if recipe.get("fsdp_config"):
        weights, adapter, states = (part / cards for part in (weights, adapter, states))
        weights += gathered(config, kinds)
        if recipe.get("gradient_accumulation_steps", 1) == 1:
            gradients /= cards
    # From a step's second micro-step on, every gradient is there while the activations are.
    beside = gradients if recipe.get("gradient_accumulation_steps", 1) > 1 else 0
    # The gradient of the embedding is made whole before it is added to the one that is there.
    copy = embeddings_width(recipe) * config.vocab_size * config.hidden_size
    embedding = copy if trains(recipe, "model.embed_tokens") else 0
    moments = {
        "loss": (beside, kept, loss_memory(config, recipe, tokens)),
        "last layer's backward": (beside, kept + top, 0.0),
        "end of the backward": (gradients, embedding + width * tokens, 0.0),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    held, activations, logits = moments[moment]
    peak = weights + adapter + states + held + activations + logits
    return Plan(weights, adapter, held, gradients, states, activations, logits, peak, moment)


def fits(planned: Plan, card_gib: float) -> bool:
    """Does it fit beside what driver and desktop take?"""
    return planned.card <= card_gib * GIB - RESERVED


def on_cards(config: PretrainedConfig, recipe: dict[str, Any], card_gib: float) -> int | None:
    """How many cards are enough for every weight of the base with PROFILE=fsdp, at the recipe's tokens per step."""
    for cards in (2, 4, 8, 16, 32):
        shared = recipe | load_profile("fsdp", "")[1]
        try:
            share_step(shared, cards)
        except BadInput:  # fewer rows than cards
            return None
        if fits(plan(config, shared, cards), card_gib):
            return cards
    return None


def remedy(config: PretrainedConfig, recipe: dict[str, Any], card_gib: float) -> str:
    """What to change for the recipe to fit, cheapest first, as YAML in a line; or that none of it is enough."""
    micro = recipe["micro_batch_size"]
    step = micro * recipe.get("gradient_accumulation_steps", 1)
    steps: list[dict[str, Any]] = [{"gradient_checkpointing": True}]
    if not recipe.get("rl"):  # TRL makes its loss of whole logits
        steps.append({"liger_fused_linear_cross_entropy": True})
    steps += [
        {"micro_batch_size": size, "gradient_accumulation_steps": step // size}
        for size in range(micro - 1, 0, -1)
        if step % size == 0
    ]
    said: dict[str, Any] = {}
    for change in steps:
        said |= {key: value for key, value in change.items() if recipe.get(key) != value}
        fused = {"chunked_cross_entropy": None} if "liger_fused_linear_cross_entropy" in said else {}
        planned = plan(config, recipe | said | fused)
        if fits(planned, card_gib):
            return ", ".join(f"{key}: {json.dumps(value)}" for key, value in said.items())
    other = "take a smaller base"
    if not recipe.get("adapter"):
        other = f"train an adapter (as 2b), or {other}"
        if cards := on_cards(config, recipe, card_gib):
            other = f"take {cards} such cards (PROFILE=fsdp), or {other}"
    elif large := [card for card in CARDS if fits(planned, card)]:
        other = f"{other}, or a card of {large[0]} GB: each of several cards would hold the whole base"
    return f"does not fit: {planned.card / GIB:.1f} GiB with all settings that save memory; {other}"


def table(plans: dict[str, Plan]) -> str:
    """Markdown: a row per part, a column per recipe, in GiB."""
    parts = {
        "weights": "weights", "adapter, copies": "adapter", "gradients": "gradients", "optimizer": "optimizer",
        "activations": "activations", "logits and loss": "logits", "**planned peak, allocator**": "peak",
        "**with CUDA context**": "card",
    }  # fmt: skip
    planned = plans.values()
    rows = [[name, *(f"{getattr(plan, part) / GIB:.2f}" for plan in planned)] for name, part in parts.items()]
    rows.append(["the peak is at", *(plan.moment for plan in planned)])
    rows += [[f"fits in {card} GB", *("yes" if fits(plan, card) else "no" for plan in planned)] for card in CARDS]
    return tabulate(rows, ["planned, GiB", *plans], tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="recipes (default: the shipped ones)")
    tinyllama = Path(__file__).with_name("tinyllama.json")
    bases = "model folder or config.json (default: train/FOLDER-*.json of the recipe's, or TinyLlama)"
    parser.add_argument("--base", type=Path, help=bases)
    args = parser.parse_args()
    planned: dict[Path, dict[str, tuple[dict[str, Any], Plan]]] = defaultdict(dict)
    for path in args.recipes or sorted((ROOT / "recipes").glob("*.yml")):
        name = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
        recipe = {key: value for key, value in load_recipe(path).items() if value is not None}
        sizes = sorted(tinyllama.parent.glob(f"{Path(recipe['base_model']).name}-*.json"))
        for base in [args.base] if args.base else sizes or [tinyllama]:
            try:
                planned[base][name] = recipe, plan(load_config(base), recipe)
            except KeyError as error:
                raise BadInput(f"{name} has no {error}, which the plan needs") from error
            except (BadInput, ValueError) as error:  # PEFT's of what no adapter can be made of
                raise BadInput(f"{name}: {error}") from error
    print(f"A card keeps {RESERVED / GIB:.0f} GiB for its driver and a desktop. Planned, not measured.")
    for base, plans in planned.items():
        print(f"\nOn {base.stem}:\n\n{table({name: found for name, (_, found) in plans.items()})}\n")
        for name, (recipe, found) in plans.items():
            for card in CARDS:
                if not fits(found, card):
                    print(f"{name} in {card} GB: {remedy(load_config(base), recipe, card)}")


if __name__ == "__main__":
    run(main)
