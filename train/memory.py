"""Will a recipe fit on a card? Plans the memory of a training from the base's config.json and the recipe alone.

Needs neither a GPU nor weights. Parameters are counted on the real model and the real adapter, without storage (torch's
meta device); everything else is arithmetic, one function a part, with its source. What is printed is *planned*, never
measured: `make bench-gpu` measures, and sets this plan beside what it finds.

  python train/memory.py                                   the shipped recipes, on TinyLlama's architecture
  python train/memory.py --base models/base                on another base (a folder, or its config.json)
  python train/memory.py bench/kafka/2a.yml            other recipes

The moments at which a step can need most are three: the loss (every checkpoint, and the logits), the backward pass of
the last layer (every checkpoint, and one layer's activations; without checkpointing every layer's), and the end of the
backward pass (every gradient). Known are Llama's kind of layer (RMSNorm, grouped attention, gated MLP), trained in bf16.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prep.common import BadInput, run
from train.stages import load_recipe

ROOT = Path(__file__).parent.parent
GIB = 2**30
CARDS = (8, 12, 16, 24)  # GiB, as cards of these sizes have them
# What the driver and a desktop take of a card, and what CUDA itself takes (context, cuBLAS workspaces): conventions of this
# project, not figures of any card; the bench records the second, as the driver's peak less the allocator's.
RESERVED = 1.0 * GIB
CUDA_CONTEXT = 0.5 * GIB
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIMIZERS = {
    "adamw_torch": "fp32 moments", "adamw_torch_fused": "fp32 moments", "adamw_torch_8bit": "torchao, 8 bits",
    "adamw_8bit": "bitsandbytes, 8 bits", "adamw_bnb_8bit": "bitsandbytes, 8 bits",
}  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """One kind of parameter: the number of elements of each tensor, its bytes an element, and whether it is trained."""

    kind: str  # matrix, embedding, head, norm or adapter
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
    logits: float  # at the peak: logits, their gradient, and what the loss works with
    peak: float  # as the allocator would see it
    moment: str  # which moment the peak is

    @property
    def card(self) -> float:
        """What the driver would see."""
        return self.peak + CUDA_CONTEXT


def load_config(base: Path) -> PretrainedConfig:
    """config.json of a model folder, or that file. Raises BadInput when it is missing or no Llama-like model."""
    path = base / "config.json" if base.is_dir() else base
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(said.pop("model_type"), **said)
    except OSError as error:
        raise BadInput(f"{path} is missing; `make base` collects a base model, or name another with --base") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{path} is no config.json of a Transformers model: {error}") from error
    with torch.device("meta"):
        names = {name.rsplit(".", 1)[-1] for name, _ in AutoModelForCausalLM.from_config(config).named_modules()}
    if not names.issuperset(LINEARS):
        raise BadInput(f"{path}: the planner knows Llama's kind of layer; {config.model_type} has another")
    return config


def build(config: PretrainedConfig, recipe: dict[str, Any]) -> PreTrainedModel:
    """The model, and the recipe's adapter on it, on the meta device: every tensor has its shape and no storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return with_adapter(model, recipe) if recipe.get("adapter") else model


def with_adapter(model: PreTrainedModel, recipe: dict[str, Any]) -> Any:
    """A new LoRA adapter as Axolotl makes it of the same keys (`lora_target_linear`: every linear but the head)."""
    return get_peft_model(
        model,
        LoraConfig(
            r=recipe["lora_r"],
            lora_alpha=recipe["lora_alpha"],
            lora_dropout=recipe.get("lora_dropout", 0.0),
            use_rslora=bool(recipe.get("peft_use_rslora")),
            target_modules="all-linear" if recipe.get("lora_target_linear") else recipe["lora_target_modules"],
            task_type="CAUSAL_LM",
        ),
    )


def quantised_width(recipe: dict[str, Any]) -> float:
    """Bytes a weight of the matrices of a layer.

    NF4 holds half a byte, and a scale for each block of 64: fp32, or with double quantisation one byte and an fp32 for
    each 256 of them (Dettmers et al. 2023, QLoRA, section 3; 0.127 bit a weight). LLM.int8 holds a byte (the scales,
    one fp32 a row, are left out). Otherwise bf16.
    """
    if recipe.get("load_in_4bit"):
        double = (recipe.get("bnb_config_kwargs") or {}).get("bnb_4bit_use_double_quant")
        return 0.5 + (1 / 64 + 4 / (64 * 256) if double else 4 / 64)
    return 1 if recipe.get("load_in_8bit") else 2


def embeddings_width(recipe: dict[str, Any]) -> int:
    """Bytes a weight of embeddings, head and norms, and therefore an element of the residual stream.

    Axolotl raises them to fp32, and takes that back only for adapters and for attention that needs half precision
    (axolotl/loaders/model.py, `_configure_embedding_dtypes`): `bf16: true` with sdpa leaves them in fp32.
    """
    half = recipe.get("adapter") or recipe.get("attn_implementation") not in (None, "sdpa", "eager")
    return 2 if half else 4


def tensors(model: PreTrainedModel, recipe: dict[str, Any]) -> list[Tensors]:
    """Every parameter by kind, with the width Axolotl holds it in. Adapters are fp32 (PEFT, `autocast_adapter_dtype`)."""
    found: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        kind = (
            "adapter" if "lora_" in name
            else "norm" if "norm" in name
            else "embedding" if "embed_tokens" in name
            else "head" if "lm_head" in name
            else "matrix"
        )  # fmt: skip
        found.setdefault(kind, []).append(parameter.numel())
    width: dict[str, float] = {"adapter": 4, "matrix": quantised_width(recipe)}
    trained = {"adapter"} if recipe.get("adapter") else set(found)
    return [
        Tensors(kind, tuple(sizes), width.get(kind, embeddings_width(recipe)), kind in trained)
        for kind, sizes in found.items()
    ]


def optimizer_state(optimizer: str, kinds: Iterable[Tensors]) -> float:
    """Bytes of both moments of Adam.

    8 bits: a code and, for each block of 256, an fp32 scale. torchao (torchao/optim/adam.py, `_new_buffer`) leaves tensors of
    fewer than 4,096 elements, or of a length that is no multiple of 256, as they are, and keeps a table of 256 fp32 a
    tensor. bitsandbytes leaves those below 4,096 in fp32, and Transformers has it do so for every nn.Embedding
    (transformers/trainer.py, `register_module_override`). Otherwise the moments have the width of the weights.
    """
    if optimizer not in OPTIMIZERS:
        raise BadInput(f"the planner does not know optimizer {optimizer}; it knows {', '.join(OPTIMIZERS)}")
    total = 0.0
    for kind in kinds:
        for elements in kind.elements if kind.trained else ():
            if OPTIMIZERS[optimizer].startswith("torchao"):
                coded = elements >= 4096 and elements % 256 == 0
                each = elements * (1 + 4 / 256) + 256 * 4 if coded else elements * kind.width
            elif OPTIMIZERS[optimizer].startswith("bitsandbytes"):
                coded = elements >= 4096 and kind.kind != "embedding"
                each = elements * (1 + 4 / 256) if coded else elements * 4
            else:
                each = elements * kind.width
            total += 2 * each
    return total


def layer_activations(config: PretrainedConfig, recipe: dict[str, Any]) -> float:
    """Bytes a token that the forward pass of one layer saves for its backward pass, its own input included.

    Counted on what autograd keeps (transformers/models/llama/modeling_llama.py under bf16 autocast, liger_kernel/ops,
    axolotl/kernels/lora.py); the method is that of Korthikanti et al. 2022, Reducing Activation Recomputation. With
    h, i, q, k the widths of the residual stream, the MLP, the queries and the keys:

      norms      twice: Liger keeps the input; Transformers an fp32 copy, and the scaled input if the norm is trained
      inputs     of q, k, v and of gate, up: autocast makes a bf16 copy for each linear of an fp32 input; a bf16
                 input is shared, unless PEFT casts it for each adapter; with LoRA kernels it is shared again
      attention  queries, keys, values, output in bf16, an fp32 log-sum a head
      MLP        gate and up; besides, unfused: silu(gate); and the input of `down` unless the LoRA kernel computes it again
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
    # An input that Transformers' norm copies to fp32 is no saved tensor itself, but the checkpoint keeps it.
    own_input = residual * h if residual == 2 and not recipe.get("liger_rms_norm") else 0
    return norms + inputs + attention + mlp + rank + own_input


def layer_backward(config: PretrainedConfig, recipe: dict[str, Any]) -> float:
    """Bytes a token of the gradients alive in the middle of a layer's backward pass.

    The gradient of the residual stream, and in the MLP those of the input of `down`, of gate and of up, in bf16. PEFT's
    adapters work in fp32: the input of `down`, cast, its gradient there, and the same in bf16 come on top, unless
    the LoRA kernel does the MLP.
    """
    h, i = config.hidden_size, config.intermediate_size
    casts = 6 * i if recipe.get("adapter") and not recipe.get("lora_mlp_kernel") else 0
    return embeddings_width(recipe) * h + 2 * 3 * i + casts


def loss_memory(config: PretrainedConfig, recipe: dict[str, Any], tokens: int) -> float:
    """Bytes at the loss: the final norm and the logits with all that is made of them.

    Plain: the fp32 log-softmax, its gradient and the logits' gradient are alive together, 12 bytes a token and word.
    Chunked (axolotl/monkeypatch/loss/chunked.py): bf16 logits and their gradient, 4 bytes, and one chunk of eight in
    fp32. Liger fused (liger_kernel/ops/fused_linear_cross_entropy.py): chunks of next_power_of_2(tokens / (V / h))
    tokens in bf16, the gradient of the hidden states, and that of the head if it is trained. A head in fp32 is cast
    to bf16.
    """
    h, v, residual = config.hidden_size, config.vocab_size, embeddings_width(recipe)
    head_cast = 2 * v * h if residual == 4 else 0
    norm = tokens * h * (residual + (0 if recipe.get("liger_rms_norm") else 4) + 2)
    if recipe.get("liger_fused_linear_cross_entropy"):
        rows = -(-tokens // -(-v // h))
        chunk = 1 << (rows - 1).bit_length()
        gradients = residual * h * tokens + (0 if recipe.get("adapter") else residual * v * h)
        return norm + head_cast + gradients + 2 * chunk * v
    if recipe.get("chunked_cross_entropy"):
        return norm + head_cast + 4 * tokens * v + 2 * 4 * tokens * v / 8
    return norm + head_cast + 12 * tokens * v


def check_planned(recipe: dict[str, Any]) -> None:
    """Raises BadInput on what the arithmetic here does not cover."""
    if recipe.get("bf16") not in (True, "auto"):
        raise BadInput("the planner counts a training in bf16; the recipe says `bf16: " + str(recipe.get("bf16")) + "`")
    uncounted = ("activation_offloading", "layer_offloading", "selective_checkpointing", "torch_compile")
    for key in (*uncounted, "lora_modules_to_save", "unfrozen_parameters", "peft_use_dora"):
        if recipe.get(key):
            raise BadInput(f"the planner does not count what `{key}` does to memory; `make bench-gpu` measures it")


def plan(config: PretrainedConfig, recipe: dict[str, Any]) -> Plan:
    """What one recipe takes on one base, at its peak, in bytes."""
    check_planned(recipe)
    kinds = tensors(build(config, recipe), recipe)
    tokens = recipe["micro_batch_size"] * recipe["sequence_len"]  # packed or not, a micro-step has them all
    layers, width = config.num_hidden_layers, embeddings_width(recipe) * config.hidden_size
    layer = layer_activations(config, recipe)
    if recipe.get("gradient_checkpointing"):
        kept, top = layers * width * tokens, (layer - width + layer_backward(config, recipe)) * tokens
    else:
        kept, top = layers * layer * tokens, layer_backward(config, recipe) * tokens
    if quantised_width(recipe) < 2:
        top += 2 * config.hidden_size * config.intermediate_size  # the matrix at hand, back in bf16
    adapter = sum(kind.bytes for kind in kinds if kind.kind == "adapter")
    weights = sum(kind.bytes for kind in kinds) - adapter
    gradients = sum(kind.bytes for kind in kinds if kind.trained)
    states = optimizer_state(recipe["optimizer"], kinds)
    # From the second micro-step of a step on, every gradient is there while the activations are.
    beside = gradients if recipe.get("gradient_accumulation_steps", 1) > 1 else 0
    loss = loss_memory(config, recipe, tokens)
    # The gradient of the embedding is made whole before it is added to the one that is there.
    embedding = 0 if recipe.get("adapter") else embeddings_width(recipe) * config.vocab_size * config.hidden_size
    moments = {
        "loss": (beside, kept, loss),
        "last layer's backward": (beside, kept + top, 0.0),
        "end of the backward": (gradients, embedding + width * tokens, 0.0),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    held, activations, logits = moments[moment]
    static = weights + adapter + states
    return Plan(
        weights, adapter, held, gradients, states, activations, logits, static + held + activations + logits, moment
    )  # fmt: skip


def fits(planned: Plan, card_gib: float) -> bool:
    """Does it fit beside what driver and desktop take?"""
    return planned.card <= card_gib * GIB - RESERVED


def remedy(config: PretrainedConfig, recipe: dict[str, Any], card_gib: float) -> str:
    """In a line: what to change, cheapest first, for the recipe to fit; or that nothing of it is enough."""
    changed, said = dict(recipe), []
    if not changed.get("gradient_checkpointing"):
        changed["gradient_checkpointing"] = True
        said.append("gradient_checkpointing: true")
        if fits(plan(config, changed), card_gib):
            return ", ".join(said)
    if not changed.get("liger_fused_linear_cross_entropy"):
        changed |= {"liger_fused_linear_cross_entropy": True, "chunked_cross_entropy": None}
        said.append("liger_fused_linear_cross_entropy: true")
        if fits(plan(config, changed), card_gib):
            return ", ".join(said)
    step = changed["micro_batch_size"] * changed.get("gradient_accumulation_steps", 1)
    for micro in [size for size in range(changed["micro_batch_size"] - 1, 0, -1) if step % size == 0]:
        changed |= {"micro_batch_size": micro, "gradient_accumulation_steps": step // micro}
        if fits(plan(config, changed), card_gib):
            return ", ".join([*said, f"micro_batch_size: {micro}, gradient_accumulation_steps: {step // micro}"])
    needed = plan(config, changed).card / GIB
    if changed.get("adapter"):
        return f"nothing here: with all of it {needed:.1f} GiB are planned; take a smaller base"
    return (
        f"nothing here: with all of it {needed:.1f} GiB are planned; train an adapter (as 2b), or take a smaller base"
    )


def table(plans: dict[str, Plan]) -> str:
    """Markdown: a row a part, a column a recipe, in GiB."""
    parts = {
        "weights": lambda p: p.weights,
        "adapter": lambda p: p.adapter,
        "gradients": lambda p: p.gradients,
        "optimiser": lambda p: p.optimizer,
        "activations": lambda p: p.activations,
        "logits and loss": lambda p: p.logits,
        "**planned peak, allocator**": lambda p: p.peak,
        "CUDA context (assumed)": lambda p: CUDA_CONTEXT,
        "**planned peak, card**": lambda p: p.card,
    }
    rows = [f"| planned, GiB | {' | '.join(plans)} |", "|---|" + "---|" * len(plans)]
    rows += [
        f"| {name} | " + " | ".join(f"{of(p) / GIB:.2f}" for p in plans.values()) + " |" for name, of in parts.items()
    ]
    rows += ["| the peak is at | " + " | ".join(p.moment for p in plans.values()) + " |"]
    rows += [
        f"| fits in {card} GB | " + " | ".join("yes" if fits(p, card) else "no" for p in plans.values()) + " |"
        for card in CARDS
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="recipes (default: the shipped ones)")
    parser.add_argument(
        "--base",
        type=Path,
        default=ROOT / "bench/tinyllama.json",
        help="model folder or config.json (default: TinyLlama)",
    )
    args = parser.parse_args()
    paths = args.recipes or sorted((ROOT / "recipes").glob("*.yml"))
    for path in paths:
        if not path.is_file():
            raise BadInput(f"no recipe {path}")
    config = load_config(args.base)
    recipes = {str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path): load_recipe(path) for path in paths}
    plans = {}
    for name, recipe in recipes.items():
        try:
            plans[name] = plan(config, recipe)
        except KeyError as error:
            raise BadInput(f"{name} does not say {error}, which the plan needs") from error
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    print(table(plans))
    print(f"\nA card keeps {RESERVED / GIB:.0f} GiB for its driver and a desktop. Planned, not measured.\n")
    for name, recipe in recipes.items():
        for card in CARDS:
            if not fits(plans[name], card):
                print(f"{name} in {card} GB: {remedy(config, recipe, card)}")


if __name__ == "__main__":
    run(main)
