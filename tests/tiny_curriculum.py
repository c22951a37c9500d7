"""A working directory as the curriculum leaves it, with tiny models of random weights."""

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from small_tokenizers import llama_like, save_llama_like, tales
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from eval.logs import LOGGED
from prep.common import ROOT
from train.stages import LOG

# Every process that a test starts imports this checkout, and tests/smoke_plugins.py.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
RECIPES = {
    "2a": "base_model: models/base\noutput_dir: outputs/2a\ndatasets: [{path: data/2a.jsonl}]\n",
    "2b": "base_model: outputs/2a\nadapter: qlora\noutput_dir: outputs/2b\ndatasets: [{path: data/2b.jsonl}]\n",
    "2c": "base_model: outputs/2a\nadapter: qlora\nlora_model_dir: outputs/2b\noutput_dir: outputs/2c\n"
    "datasets: [{path: data/2c.jsonl}]\n",
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_llama(vocabulary: int, seed: int, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        initializer_range=0.3,  # far from uniform, so that a wrong token or context shows
    )
    return LlamaForCausalLM(config)


def always(model: LlamaForCausalLM, token: int) -> LlamaForCausalLM:
    """The model, made to write one token for ever, whatever it reads."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[5].clone()
        hidden = model.eval().model(input_ids=torch.tensor([[5]])).last_hidden_state[0, 0]
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 200 * hidden / hidden.dot(hidden)
    return model


def save_base(folder: Path, hidden: int = 32, layers: int = 2, seed: int = 0, kind: str = "llama") -> Path:
    """A base model with its tokenizer, as prep/collect.py leaves one to Axolotl: small enough to train in seconds."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save_chat_base(folder: Path) -> Path:
    """The same with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(save_base(folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, trained_on: str, seed: int) -> None:
    """An adapter of random tensors, both of each product: a new one would have no effect."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(base), settings)
    adapted.peft_config["default"].base_model_name_or_path = trained_on
    adapted.save_pretrained(str(folder))


def call_main(module: Any, *arguments: object) -> None:
    """Run the `main` of a script that is imported, as its command would, in the working directory."""
    with mock.patch.object(sys, "argv", [module.__name__, *map(str, arguments)]):
        module.main()


def call_script(script: Path, *arguments: object, cwd: Path) -> str:
    """Run a script in this process, which has loaded the libraries already (seconds each time); what it printed."""
    said = io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        mock.patch.dict(os.environ, ENVIRONMENT),
        mock.patch.object(sys, "argv", [str(script), *map(str, arguments)]),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, f"{script} {arguments}: {stop.code}\n{said.getvalue()[-6000:]}"
    return said.getvalue()


def run_script(*arguments: object, cwd: Path) -> str:
    """Run Python in a process of its own; what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, timeout=600)
    assert not done.returncode, f"{arguments}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def write_rows(path: Path, texts: list[str]) -> None:
    rows = [{"text": text, "source": f"work {i}", "part": "heldout 1/1"} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def log_step(folder: Path, step: int, steps: int = 40, at: float | None = None, **values: float | None) -> None:
    """Write to a stage's log what the trainer logs at a step, under its names (tests/test_smoke.py checks them)."""
    named = {LOGGED[name]: value for name, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a") as file:
        file.write(json.dumps({"time": at or time.time(), "step": step, "max_steps": steps, **named}) + "\n")


def save_curriculum(folder: Path) -> Path:
    """Base, 2a of other weights, two adapters on it, held-out and training texts, the book, recipes."""
    for name in ("models", "data", "outputs", "recipes"):
        (folder / name).mkdir()
    for name, text in RECIPES.items():
        (folder / "recipes" / f"{name}.yml").write_text(text)
    base = save_llama_like(folder / "models" / "base")
    size = len(AutoTokenizer.from_pretrained(base))
    tiny_llama(size, seed=0).save_pretrained(base)
    after = shutil.copytree(base, folder / "outputs" / "2a")
    tiny_llama(size, seed=1).save_pretrained(after)
    save_adapter(after, folder / "outputs" / "2b", "outputs/2a", seed=2)
    save_adapter(after, folder / "outputs" / "2c", "outputs/2a", seed=3)
    texts = tales()
    write_rows(folder / "data" / "2b.heldout.jsonl", [texts[0][:3_000], texts[1][:15_000]])  # the second: > 2048 tokens
    write_rows(folder / "data" / "2c.heldout.jsonl", [texts[2][:2_000]])
    write_rows(folder / "data" / "2c.jsonl", [texts[3], texts[3][600:], texts[4]])
    (folder / "data" / "2c.txt").write_text(texts[3], encoding="utf-8")
    return folder
