"""From the chain of recipes to models in memory: what is there, what it is made of, and that it fits together."""

import argparse
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from prep.common import BadInput, cpu_name, git_state, reason, versions
from train.dequantise import merge
from train.stages import Stage, line_of

LIBRARIES = (
    "lm_eval", "torch", "transformers", "peft", "tokenizers", "safetensors", "axolotl", "numpy", "matplotlib", "pyspellchecker"
)  # fmt: skip
MAX_LENGTH = 2048  # tokens: the window of every stage and base, whatever a model's config allows
BASE = "base"  # the report's name for what the first stage starts from
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MERGED_DTYPE = torch.float16  # bfloat16 keeps 8 bits of a weight, and loses a part of what the adapter learned

# Forms in which weights are measured besides as trained: full weights quantised, an adapter before its first step, an
# adapter merged into its base.
QUANTISED, START, MERGED = "quantised", "start", "merged"
GGUF = "gguf"  # an exported file, which llama.cpp runs


@dataclass(frozen=True)
class Candidate:
    """A row of the report: a full model, or an adapter on one."""

    name: str
    model: Path  # folder of the full model
    adapter: Path | None
    parent: str | None  # the row it is compared with
    stage: Stage | None  # None for the base
    quantization: dict[str, Any] | None = None  # arguments of BitsAndBytesConfig for `model`; None: 16 bits
    form: str | None = None  # None: as trained

    @property
    def weights(self) -> list[Path]:
        """The files that make this row: safetensors of adapter or model, or the one GGUF."""
        if self.form == GGUF:
            return [self.model]
        return sorted(self.adapter.glob("adapter_model.safetensors")) if self.adapter else full_weights(self.model)


def full_weights(model: Path) -> list[Path]:
    """The safetensors files of a full model."""
    return sorted(model.glob("model*.safetensors"))


def files_of(row: Candidate) -> list[Path]:
    """The files that decide what a row scores: its weights, its base's, the tokenizer and the settings."""
    names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    files = [*row.weights, *full_weights(row.model)]
    files += [row.model / name for name in names if (row.model / name).is_file()]
    if row.adapter:
        files.append(row.adapter / "adapter_config.json")
        if not files[-1].is_file():
            raise BadInput(f"stage {row.name} is not whole: {files[-1]} is missing")
    return list(dict.fromkeys(files))


def candidate(stage: Stage, base: str = BASE) -> Candidate:
    """The row of one stage, compared with the one it builds on; an adapter's base is quantised as its recipe says."""
    if not stage.adapter:
        return Candidate(stage.name, stage.output_dir, None, stage.parent or base, stage)
    bits = {key: True for key in ("load_in_4bit", "load_in_8bit") if stage.config.get(key)}
    quantization = {**bits, **stage.config.get("bnb_config_kwargs", {})} if bits else None
    return Candidate(stage.name, stage.base_model, stage.output_dir, stage.parent or base, stage, quantization)


def candidates(chain: list[Stage]) -> list[Candidate]:
    """The base and every stage, in the chain's order; bases of several curricula are named as their folders."""
    bases = {stage.name: line_of(stage.name, chain)[0].base_model for stage in chain}
    names = {base: BASE if len(set(bases.values())) == 1 else base.name for base in bases.values()}
    rows: list[Candidate] = []
    for base, name in names.items():
        rows.append(Candidate(name, base, None, None, None))
        rows += [candidate(stage, name) for stage in chain if bases[stage.name] == base]
    return rows


def merged(row: Candidate) -> Candidate:
    """The row of an adapter merged into its base."""
    return replace(row, name=f"{row.name} (merged)", parent=row.name, form=MERGED)


def exported(path: Path) -> Candidate:
    """The row of a GGUF file."""
    return Candidate(path.stem, path, None, None, None, form=GGUF)


def writer(chain: list[Stage], stage: str | None) -> Candidate:
    """Who writes: a stage, an exported .gguf file, or by default the chain's last stage that has weights."""
    if stage and stage.endswith(".gguf"):
        if not Path(stage).is_file():
            raise BadInput(f"{stage} is missing (looked from {Path.cwd()}); `make export` makes it")
        return exported(Path(stage))
    rows = candidates(chain)
    trained = [row.name for row in rows if row.stage and row.weights]
    [row, *_] = present(rows, [stage or (trained or [chain[-1].name])[-1]])
    return row


def with_forms(rows: list[Candidate]) -> list[Candidate]:
    """The rows, and between them the same weights in other forms: the price of each is its own difference.

    A model that an adapter's recipe quantises is also evaluated quantised, and with the adapter as it started: what that
    corrects of the quantisation is not learning, so the trained adapter is compared with it. An adapter that no trained one
    continues is also evaluated merged into one 16-bit model (train/dequantise.py), which people can share.
    """
    by_name = {row.name: row for row in rows}
    continued = {row.parent for row in rows if row.weights}
    result: dict[str, Candidate] = {}
    for row in rows:
        parent = by_name[row.parent] if row.parent else None
        if row.quantization and parent and not parent.adapter:
            name = f"{parent.name} ({'nf4' if row.quantization.get('load_in_4bit') else '8-bit'})"
            result[name] = replace(parent, name=name, parent=parent.name, quantization=row.quantization, form=QUANTISED)
            start = f"{row.name} (start)"
            assert row.stage
            result[start] = replace(row, name=start, adapter=row.stage.start, parent=name, form=START)
            row = replace(row, parent=start)
        result[row.name] = row
        if row.adapter and row.name not in continued:
            result[f"{row.name} (merged)"] = merged(row)
    return list(result.values())


def present(rows: list[Candidate], wanted: list[str] | None) -> list[Candidate]:
    """The rows to evaluate: those wanted, or all that have weights and the forms that these are compared with.

    Raises BadInput when a wanted row has none, or when one is missing that a later one builds on.
    """
    by_name = {row.name: row for row in rows}
    if unknown := sorted(set(wanted or []) - set(by_name)):
        raise BadInput(f"no stage {', '.join(unknown)} in the recipes; there are: {', '.join(by_name)}")
    taken = set(wanted or [row.name for row in rows if row.form in (None, MERGED) and row.weights])
    for row in reversed([] if wanted else rows):
        if row.form and row.name in {by_name[name].parent for name in taken}:
            taken.add(row.name)
    chosen = [row for row in rows if row.name in taken]
    for row in chosen:
        missing: Candidate | None = row
        while missing and missing.weights:
            missing = by_name.get(missing.parent or "")
        if missing:
            why = "" if missing is row else f", and stage {row.name} builds on it"
            stage = missing.stage
            how = f"train it: accelerate launch -m axolotl.cli.train {stage.recipe}" if stage else "collect it first"
            raise BadInput(
                f"stage {missing.name} is missing: no safetensors weights in {missing.adapter or missing.model} "
                f"(looked from {Path.cwd()}){why}; {how}, or choose others with --stages"
            )
    return chosen


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the options that say which stages there are, and where models run."""
    option = parser.add_argument
    option("--recipes", type=Path, default=Path("recipes"), help="folder of the chain's YAML")
    option("--curriculum", default="2", help="the recipes whose names begin so (default %(default)s)")
    option("--seed", type=int, default=42, help="of whatever is drawn (default %(default)s)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    option("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**63:
        parser.error("--seed must be from 0 to 2**63 - 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no CUDA device here; use --device cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def environment(device: str, dtype: str, *more: str) -> dict[str, Any]:
    """Machine, commit, and versions of LIBRARIES and `more`."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "dtype": dtype,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions(*LIBRARIES, *more)},
        "git": git_state(),
    }


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a model folder. Raises BadInput when there is none, or when it has no BOS token."""
    if not has_tokenizer(folder):
        raise BadInput(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model): collect or train it again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise BadInput(f"the tokenizer of {folder} cannot be read: {reason(error)}") from error
    if tokenizer.bos_token_id is None:
        raise BadInput(f"the tokenizer of {folder} has no BOS token; set bos_token in its tokenizer_config.json")
    return tokenizer


def load_model(
    folder: Path, tokenizer: Tokenizer, device: str, dtype: torch.dtype, quantization: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The full model, in evaluation mode. Raises BadInput when it cannot be read, or has fewer rows than tokens.

    Attention is torch's whatever the model's config asks for: Transformers would fetch another kernel from the hub.
    """
    quantised = BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **quantization) if quantization else None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            quantization_config=quantised,
            device_map={"": device},
            attn_implementation="sdpa",
        )
    except Exception as error:  # safetensors, json and Transformers each raise their own on a torn file
        raise BadInput(f"the model in {folder} cannot be read: {reason(error)}") from error
    if len(tokenizer) > (rows := model.config.get_text_config().vocab_size):
        raise BadInput(f"the tokenizer of {folder} has {len(tokenizer)} tokens, but its model only {rows}")
    return model.eval()


def load_adapter(model: PreTrainedModel, row: Candidate, tokenizer: Tokenizer) -> PeftModel:
    """The adapter of `row` on top of `model`, in place.

    Raises BadInput when it was trained on another base or another vocabulary, or is not whole.
    """
    assert row.adapter
    if has_tokenizer(row.adapter) and load_tokenizer(row.adapter).get_vocab() != tokenizer.get_vocab():
        raise BadInput(f"adapter {row.adapter} was trained with another vocabulary than {row.model} has")
    try:
        adapted = PeftModel.from_pretrained(model, row.adapter)
    except Exception as error:  # PEFT, safetensors and json each raise their own on a torn file
        raise BadInput(f"adapter {row.adapter} does not fit {row.model}: {reason(error)}") from error
    trained_on = adapted.peft_config["default"].base_model_name_or_path
    if trained_on and Path(trained_on).resolve() != row.model.resolve():
        raise BadInput(f"adapter {row.adapter} was trained on {trained_on}, but its recipe's base_model is {row.model}")
    # PEFT says nothing of tensors that the base has no place for, and fills those that are missing with zeros.
    with safe_open(row.weights[0], "pt") as file:
        stored = set(file.keys())
    loaded = set(get_peft_model_state_dict(adapted))
    if stored != loaded:
        raise BadInput(
            f"adapter {row.adapter} does not fit {row.model}: {len(stored - loaded)} of its tensors have no place "
            f"there, {len(loaded - stored)} are missing"
        )
    # Full copies take the place of what they copy: lm-eval ties the weights of a tied base, which PEFT's wrappers do not allow.
    base: Any = adapted.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.modules_to_save["default"])
    return adapted.eval()


def loaded(
    rows: list[Candidate], device: str, dtype: torch.dtype
) -> Iterator[tuple[Candidate, PreTrainedModel | PeftModel, Tokenizer]]:
    """Each row's model and tokenizer in turn, each loaded again, so that no score depends on the rows before it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for row in rows:
        if row.form == GGUF:
            from eval import llamacpp

            yield row, *llamacpp.load(row.model)
            continue
        tokenizer = load_tokenizer(row.model)
        model: Any = load_model(row.model, tokenizer, device, dtype, row.quantization)
        unpacked = device == "cpu" and (row.quantization or {}).get("load_in_4bit")
        if unpacked:
            model = model.dequantize()  # the same numbers, which a CPU would unpack again at every forward pass
        if row.adapter:
            model = load_adapter(model, row, tokenizer)
            if unpacked and row.form != MERGED:
                model.merge_adapter()  # in place, and exact to fp32: a rank of 128 takes as long as the small model below it
        if row.form == MERGED:
            model = merge(model, load_model(row.model, tokenizer, device, MERGED_DTYPE))
            model.to(dtype)
        yield row, model, tokenizer
        del model
