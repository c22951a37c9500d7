"""`Gate`, an Axolotl plugin that all recipes list under `plugins`, and `SeedAdapter`, on which the others build.

`SeedAdapter` makes the recipe's `seed` decide a new adapter's first weights too. `Gate` makes every launch a judged one,
`accelerate launch -m axolotl.cli.train recipes/2b.yml` as well as `make stage-b`: before the training it refuses what
cannot end well; after it, train/gate.py writes outputs/2b/trained.json or says why not.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.integrations.base import BasePlugin, load_plugin
from axolotl.utils.distributed import barrier
from axolotl.utils.schemas.config import AxolotlConfigWCapabilities
from axolotl.utils.schemas.datasets import SFTDataset
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback, set_seed

from prep.common import SEAL, BadInput, end_with_parent, lock, need_room, seal
from train.dequantise import is_quantised
from train.gate import ADAPTER_SETTINGS, COPIES, check_ready, checkpoints, describe, judge, manifest_of, recall
from train.resume import at_the_end, drop_torn_rows, prepare_output, seal_rows, take_weights
from train.stages import LOG, line_of, load_chain, share_step

# Bytes on the disk while rows are tokenised, per byte of them: 29.8 GB for the 1.63 of 2b (bench/reports/rehearsal-prep.md).
TOKENISING = 18.5
# What a run may say differently when it is resumed: where it logs, what it keeps, how the rows are read.
NOT_THE_RUN = re.compile(
    r"axolotl_config_path|dataset_prepared_path|dataset_num_proc|dataloader_num_workers|save_total_limit|logging_steps"
    r"|(use_)?(wandb|mlflow|comet|tensorboard|trackio)"
)
# What the gate, later stages and the evaluation, which quantises an adapter's base, read in the recipe.
READ_LATER = (
    *("base_model", "lora_model_dir", "output_dir", "datasets", "adapter", *ADAPTER_SETTINGS),
    *(COPIES, "unfrozen_parameters", "load_in_4bit", "load_in_8bit", "bnb_config_kwargs"),
)


def starts_an_adapter(cfg: Any) -> bool:
    """Has this run a new adapter, before its first step? Not a continued one, nor a resumed run's."""
    return bool(cfg.adapter) and not (cfg.lora_model_dir or checkpoints(Path(cfg.output_dir)))


class SeedAdapter(BasePlugin):
    """Seeds before a new adapter is made: Axolotl seeds with the trainer, when A has been drawn by chance."""

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        set_seed(cfg.seed)


class Gate(BasePlugin):
    """Checks a stage before its training, locks its folder, judges it after. The first process does, the others follow."""

    def register(self, cfg: Any) -> None:
        """Axolotl's first call, on the recipe with the command line's changes (for `axolotl preprocess` and others too)."""
        heldout = [Path(dataset["path"]) for dataset in cfg.get("test_datasets") or []]
        if heldout and all(path.exists() and not path.stat().st_size for path in heldout):
            for key in ("test_datasets", "eval_steps", "load_best_model_at_end"):  # --holdout 0: nothing to validate on
                cfg[key] = None
        self.recipe = Path(cfg.get("axolotl_config_path") or "")
        self.settings = json.loads(json.dumps(cfg, default=str))
        if not torch.cuda.is_available():
            # Else accelerate takes each of several processes for the only one.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            with self.refusals():
                share_step(cfg, processes)
        # Axolotl reuses its cache of tokenised rows when the rows have changed: a folder for each version of them.
        manifests = sorted(
            {manifest_of(path) for path in [*(Path(rows["path"]) for rows in cfg.get("datasets") or []), *heldout]}
        )
        self.rows = Path(cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH)
        if all(path.exists() for path in manifests):
            digest = hashlib.sha256(b"".join(path.read_bytes() for path in manifests)).hexdigest()
            self.rows = self.rows.with_name(f"{self.rows.name}-{digest[:12]}")
        cfg["dataset_prepared_path"] = str(self.rows)
        self.cache = self.rows / "cache"
        datasets.config.HF_DATASETS_CACHE = self.cache

    def get_training_args(self, cfg: Any) -> dict[str, bool]:
        """Without a card Transformers trains in bf16 only if told to use the CPU, for which Axolotl has no key."""
        return {} if torch.cuda.is_available() else {"use_cpu": True}

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """The first call of a training: refuse, or ready the output folder. The rows are loaded by Axolotl."""
        if preprocess:
            return
        if not torch.cuda.is_available():
            cfg["device_map"] = {"": "cpu"}  # Axolotl gives each of several processes a card
        end_with_parent()
        with self.refusals():
            self.chain = load_chain(self.recipe.parent)
            self.stage = line_of(self.recipe.stem, self.chain)[-1]
        over = self.stage.verdict.exists() or at_the_end(self.stage)
        if os.environ.get("RANK", "0") == "0":
            with self.refusals():
                lock(self.stage.output_dir)
                self.start()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            barrier()  # the first process removes what a killed one left of the rows
        if over:
            raise SystemExit(0)
        self.tokenise(cfg)

    def tokenise(self, cfg: Any) -> None:
        """Make the tokenised rows, where there are none, without what `datasets` keeps of each step: twice their size.

        Axolotl would train on that. Loading them after this, it maps the rows that it has saved.
        """
        if not any(self.rows.glob(f"*/{SEAL}")):
            with self.refusals():
                need_room(self.rows, int(TOKENISING * sum(path.stat().st_size for path in self.stage.datasets)))
            (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg)
            shutil.rmtree(self.cache, ignore_errors=True)

    def start(self) -> None:
        """Check everything, then write started.json; or finish a stage that has nothing left to train. Raises BadInput."""
        stage = self.stage
        unknown = unknown_keys(self.settings, stage.config.get("plugins") or [])
        if unknown:
            raise BadInput(
                f"{self.recipe} or the command line has keys that Axolotl does not know: {', '.join(unknown)}"
            )
        for key in READ_LATER:
            if self.settings.get(key) != stage.config.get(key):
                raise BadInput(f"{key} cannot be changed on the command line: it is read again from {stage.recipe}")
        for path in map(Path.absolute, stage.datasets + stage.heldout):
            if re.search(r"[*?[]|::", str(path)):
                raise BadInput(
                    f"{path}: `datasets` takes a path with *, ?, [ or :: for a pattern; train in another folder"
                )
        ready = check_ready(stage, self.chain)
        if stage.verdict.exists():
            print(f"{describe(recall(stage, self.chain))}. Remove {stage.output_dir} to train it again.")
            return
        run = {key: value for key, value in self.settings.items() if not NOT_THE_RUN.match(key)}
        if run.get("deepspeed"):  # it cannot share out the moments of a checkpoint again
            run["num_processes"] = os.environ.get("WORLD_SIZE", "1")
        prepare_output(stage, {"settings": run, **ready})
        shutil.rmtree(self.cache, ignore_errors=True)  # of a killed run
        drop_torn_rows(self.rows)
        if at_the_end(stage):
            take_weights(stage)
            self.post_train_unload(None)

    def pre_model_load(self, cfg: Any) -> None:
        """The first call after the rows were loaded."""
        if os.environ.get("RANK", "0") == "0":
            seal_rows(self.rows)
        if found := checkpoints(Path(cfg.output_dir)):
            # Axolotl would find it as well, but only after it has made its counter of tokens.
            cfg["resume_from_checkpoint"] = str(found[-1])

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Keep what a new adapter starts from: the gate compares the trained one with it."""
        keep_16_bits(cfg, model)
        if os.environ.get("RANK", "0") == "0" and starts_an_adapter(cfg):
            model.save_pretrained(self.stage.start)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        with self.refusals():
            if (rows := len(trainer.train_dataset)) < trainer.args.world_size:
                raise BadInput(
                    f"{rows} windows cannot be shared by {trainer.args.world_size} processes: take fewer "
                    "(accelerate launch --num_processes), or prepare more windows"
                )
            size = checkpoints_size(trainer.model, cfg.optimizer, cfg.save_total_limit, bool(cfg.deepspeed))
            need_room(self.stage.output_dir, size)
        validation = trainer.get_eval_dataloader

        def every_row(*arguments: Any) -> Any:
            # For packed training Axolotl leaves out the validation rows that fill no batch, and lets a process that gets no
            # row wait for ever.
            trainer.args.dataloader_drop_last, trainer.accelerator.even_batches = False, True
            return validation(*arguments)

        trainer.get_eval_dataloader = every_row
        return [Progress(self.stage.output_dir / LOG)]

    def post_train_unload(self, cfg: Any) -> None:
        """The last call of a training that was not interrupted."""
        if os.environ.get("RANK", "0") == "0":
            with self.refusals():
                print(describe(judge(self.stage, self.chain)))
            shutil.rmtree(self.rows, ignore_errors=True)  # the stage is not trained again: 10 GB of the real run's 2a

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn BadInput into a line and exit status 1."""
        try:
            yield
        except BadInput as error:
            raise SystemExit(f"gate: {self.recipe.stem}: {error}") from error


def keep_16_bits(cfg: Any, model: Any) -> None:
    """Layers that a quantised base keeps in 16 bits, back from the fp32 of PEFT's `prepare_model_for_kbit_training`.

    Axolotl's kernels for the adapter's layers cannot multiply fp32 with bf16.
    """
    if cfg.bf16 and (cfg.load_in_4bit or cfg.load_in_8bit):
        for layer in model.modules():
            base = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
            if isinstance(base, torch.nn.Linear) and not is_quantised(base) and base.weight.dtype == torch.float32:
                base.to(torch.bfloat16)


def checkpoints_size(model: torch.nn.Module, optimizer: str, kept: int | None, deepspeed: bool) -> int:
    """Bytes of the checkpoints that are kept (all: two at least), one that is being written, and the final weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights, numbers = sum(p.nbytes for p in trained), sum(p.numel() for p in trained)
    saved, wide = weights, weights  # a moment is as wide as the weights it is of
    if deepspeed:  # which saves the weights twice, and in fp32
        saved, wide = 2 * weights + 4 * numbers, 4 * numbers
    saved += 2 * (numbers if "8bit" in optimizer else wide)
    return ((kept or 2) + 1) * saved + weights


class Progress(TrainerCallback):
    """Appends time, step, `max_steps` and what is logged to the stage's log, a line of JSON, and seals each checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero:
            line = {"time": time.time(), "step": state.global_step, "max_steps": state.max_steps, **(logs or {})}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    on_train_begin = on_step_end = on_log

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def unknown_keys(config: dict[str, Any], plugins: Iterable[str] = ()) -> list[str]:
    """Keys of a recipe and its data sets that neither Axolotl nor a plugin knows: Axolotl ignores them silently.

    The plugins are those it lists, and `plugins`: a CPU run keeps the keys of kernels that it leaves out.
    """

    def known(model: Any) -> set[str]:
        return set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}

    keys = known(AxolotlConfigWCapabilities) | {field.name for field in dataclasses.fields(TrainerCliArgs)}
    for plugin in {*(config.get("plugins") or []), *plugins}:
        if arguments := load_plugin(plugin).get_input_args():
            module, _, name = arguments.rpartition(".")
            keys |= known(getattr(importlib.import_module(module), name))
    unknown = set(config) - keys
    for dataset in [*config["datasets"], *(config.get("test_datasets") or [])]:
        unknown |= set(dataset) - known(SFTDataset)
    return sorted(unknown)
