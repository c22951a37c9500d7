"""Quantised layers back in 16 bits, and an adapter merged into them."""

from typing import Any

import bitsandbytes.nn.modules
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Params4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

# Where a processor has avx512_bf16, a 4-bit layer changes its weight's layout at its first pass without gradients. From
# then on no gradient passes through it (training continues with those of the last layers alone), and `dequantize_4bit` gives
# other numbers than it computes with.
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def is_quantised(layer: Any) -> bool:
    """Does bitsandbytes hold this layer's weight in 4 or 8 bits?"""
    return isinstance(layer.weight, Params4bit | Int8Params)


def dequantised(layer: Any) -> Tensor:
    """The weight [out, in] that a linear layer computes with, float32.

    PEFT's `dequantize_module_weight` loses the scales of an 8-bit layer that is on a CPU.
    """
    weight, found = layer.weight, layer.weight.detach()
    if isinstance(weight, Params4bit):
        found = dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(weight, Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB  # it moves there with the first forward pass
        found = int8_vectorwise_dequant(weight.data, scales)
    return torch.as_tensor(found).float()


@torch.no_grad()
def merge(adapted: PeftModel, full: PreTrainedModel) -> PreTrainedModel:
    """Give `full`, the unquantised base, the weights that quantised base and adapter have together. In place.

    An adapter belongs to the base it was trained on: it makes up for the quantisation error, from its start on
    (train/adapter_start.py). Merged into unquantised weights it would correct an error that is not there.
    """
    base: Any = adapted.get_base_model()
    for name, module in full.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            layer: Any = base.get_submodule(name)
            adapter = layer.get_delta_weight("default").float() if isinstance(layer, LoraLayer) else 0  # type: ignore[attr-defined]
            module.weight.copy_(dequantised(getattr(layer, "base_layer", layer)) + adapter)
    return full
