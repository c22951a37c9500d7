"""A new adapter that starts as the correction of its base's quantisation error: `StartAdapter`, an Axolotl plugin."""

import functools
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from axolotl.common.datasets import load_datasets
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.dict import DictDefault
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from prep.common import BadInput
from train.dequantise import dequantised, is_quantised
from train.gate import weight_files
from train.plugins import SeedAdapter, starts_an_adapter

DAMPING = 0.01  # of the inputs' mean square: what the calibration text does not use counts, and nothing is 0 / 0


class StartAdapter(SeedAdapter):
    """Sets a new adapter so that quantised base + adapter is as near to the unquantised base as its rank allows.

    For a layer y = W x with W [out, in], quantised to Q, let E = W - Q and X [tokens, in] the layer's inputs on rows that
    the stage trains on. The product of rank r that minimises the squared error of the outputs, the sum over tokens of
    |(E - scale B A) x|^2, is scale B A = U U^T E, with U [out, r] the first left singular vectors of E X^T. This is QERA
    (Zhang et al., ICLR 2025, theorem 1), written without an inverse. Layers are set one after the other while the
    calibration text runs through the model, so each sees inputs that the layers before it have already corrected.

    Layers that are not quantised keep PEFT's start: A random, by the recipe's seed, and B zero. A continued adapter and a
    resumed run are left alone. PEFT's own `replace_lora_weights_loftq` needs CUDA and forgets the adapter's scale.
    """

    tokens = 4096  # of calibration

    def root(self, inputs: Tensor) -> Tensor:
        """What weighs a layer's error, L [in, in], from its inputs [tokens, in]."""
        return root_of_moments(inputs)

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        if not starts_an_adapter(cfg):
            return
        if not (cfg.load_in_4bit or cfg.load_in_8bit):
            print("adapter start: the base is not quantised, there is nothing to correct", flush=True)
            return
        if cfg.lora_qkv_kernel or cfg.lora_o_kernel:
            # Axolotl has rewritten the attention for its kernels, and gives each layer what it calls there only after this.
            apply_lora_kernel_patches(model, DictDefault())
        rows = calibration_rows(load_datasets(cfg=cfg).train_dataset, cfg.seed, self.tokens)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(cfg.bf16)):
            try:
                print(correct(model, unquantised(cfg.base_model), rows, self.root), flush=True)
            except BadInput as error:
                raise SystemExit(f"gate: {cfg.output_dir}: {error}") from error


def calibration_rows(dataset: Any, seed: int, tokens: int) -> list[Tensor]:
    """Token ids [length] of random rows of Axolotl's tokenised data set, until they are `tokens` long or all are taken."""
    rows: list[Tensor] = []
    for index in random.Random(seed).sample(range(len(dataset)), min(len(dataset), tokens)):
        if sum(map(len, rows)) >= tokens:
            break
        rows.append(torch.tensor(dataset[index]["input_ids"]))
    return rows


def unquantised(base_model: str) -> Callable[[str], Tensor]:
    """A function from a tensor's name to its value in the safetensors of a model folder."""
    files: dict[str, Path] = {}
    for path in weight_files(Path(base_model)):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)

    def tensor(name: str) -> Tensor:
        with safe_open(files[name], "pt") as file:
            value: Tensor = file.get_tensor(name)
        return value

    return tensor


def root_of_moments(inputs: Tensor, damping: float = DAMPING) -> Tensor:
    """L [in, in] with L L^T = X^T X / tokens, damped, of inputs X [tokens, in], float32."""
    moments = inputs.T @ inputs / len(inputs)
    moments.diagonal().add_(damping * moments.diagonal().mean() + 1e-12)
    return torch.linalg.cholesky(moments)


def low_rank(error: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B [out, rank] and A [rank, in] whose product is nearest to `error` [out, in] on inputs of these moments, float32.

    Also the share of the squared output error that they leave. Each direction's size is shared evenly by A and B.
    """
    outputs = error @ root  # its left singular vectors and values are those of E X^T / sqrt(tokens)
    u = torch.svd_lowrank(outputs, q=min(rank + 16, *error.shape), niter=4)[0][:, :rank]
    a = u.T @ error
    size = a.norm(dim=1).clamp(min=1e-12).sqrt()
    left = 1 - (u.T @ outputs).square().sum() / outputs.square().sum().clamp(min=1e-30)
    return u * size, a / size[:, None], left.item()


@torch.no_grad()
def correct(
    model: Any,
    weight: Callable[[str], Tensor],
    rows: list[Tensor],
    root: Callable[[Tensor], Tensor] = root_of_moments,
) -> str:
    """Set the adapter of `model`, a PeftModel, in place, layer after layer. Returns a line on the gain.

    Raises BadInput when a quantised layer computes with other weights than `dequantised` gives: none is corrected by those.
    `weight` gives an unquantised tensor by name, `root` a matrix L [in, in] from a layer's inputs, which weighs its error.
    """
    began, training = time.monotonic(), model.training
    model.eval()
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # [rows, length]
    real = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    left: list[float] = []
    last: list[Tensor] = []  # inputs and the root of their moments: q, k and v have the same, so have gate and up

    @torch.autocast(model.device.type, enabled=False)  # bf16 is too coarse for moments
    def set_layer(layer: Any, inputs: tuple[Tensor, ...], name: str) -> None:
        if not last or last[0] is not inputs[0]:
            last[:] = inputs[0], root(inputs[0][real.to(inputs[0].device)].float())
        base, scale = layer.get_base_layer(), layer.scaling["default"] ** 0.5
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        held = dequantised(base)
        few = inputs[0][:1, :8]
        outputs = linear(few.float(), held, None if base.bias is None else base.bias.float())
        if (base(few).float() - outputs).norm() > 0.1 * outputs.norm():  # 8 bits round the inputs too, to 0.01
            raise BadInput(
                f"on this processor bitsandbytes {version('bitsandbytes')} computes {name} with other weights than it gives "
                "back; nothing was trained. Take another version of it, or another machine"
            )
        error = weight(f"{name}.weight").to(a.device).float() - held
        rank = min(a.shape[0], *error.shape)
        new_b, new_a, share = low_rank(error, last[1], rank)
        b[:, :rank], a[:rank] = new_b / scale, new_a / scale
        left.append(share)

    some = rows[0][:512]  # enough to see the gain; every token takes as long as in the calibration itself
    before = loss(model, some)
    adapted = [(name, layer) for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)]
    hooks = [
        layer.register_forward_pre_hook(functools.partial(set_layer, name=name))  # type: ignore[attr-defined]
        for name, layer in adapted
        if is_quantised(layer.get_base_layer())
    ]
    model.get_base_model().base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    after = loss(model, some)
    model.train(training)
    return (
        f"adapter start: {len(left)} quantised layers corrected on {int(real.sum())} tokens in {time.monotonic() - began:.0f} s, "
        f"{sum(left) / max(1, len(left)):.0%} of the squared error of their outputs left; "
        f"loss on {len(some)} of them {before:.4f} -> {after:.4f}"
    )


def loss(model: Any, row: Tensor) -> float:
    """Mean negative log-likelihood of a row's tokens after the first, nats per token."""
    ids = row[None].to(model.device)
    return float(model(ids, labels=ids).loss)
