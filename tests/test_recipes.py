"""The recipes: Axolotl accepts them and ignores no key, and they make one chain from the base to the novel."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from prep.common import ROOT, BadInput
from train.stage import OVERRIDES, as_arguments, load_profile, main
from train.stages import Stage, line_of, load_chain, share_step

CHAIN = load_chain(ROOT / "recipes")
FIRST = load_chain(ROOT / "recipes", "2")


@pytest.mark.parametrize("stage", CHAIN, ids=lambda stage: stage.name)
def test_axolotl_accepts_it_and_ignores_no_key(stage: Stage, axolotl_validates: Callable) -> None:
    from train.plugins import unknown_keys  # imports all of Axolotl

    config = stage.config
    axolotl_validates(config)
    # What the gate makes of it when the rows were prepared with --holdout 0.
    assert not axolotl_validates(config | {"test_datasets": None, "eval_steps": None})["test_datasets"]
    assert unknown_keys(config) == []


@pytest.mark.parametrize("stage", CHAIN, ids=lambda stage: stage.name)
def test_a_step_keeps_its_rows_on_several_cards(stage: Stage) -> None:
    for cards in (1, 2, 4):
        config = dict(stage.config)
        share_step(config, cards)
        rows = stage.config["micro_batch_size"] * stage.config["gradient_accumulation_steps"]
        assert cards * config["micro_batch_size"] * config["gradient_accumulation_steps"] == rows
        assert config["micro_batch_size"] <= stage.config["micro_batch_size"]
    with pytest.raises(BadInput, match=f"{rows} rows|cannot be shared by {rows + 1} processes"):
        share_step(dict(stage.config), rows + 1)


def test_what_every_stage_shares() -> None:
    for name, config in ((stage.name, stage.config) for stage in CHAIN):
        rows = "3b" if name == "3c" else name  # the ablation reads what 3b reads
        assert [dataset["path"] for dataset in config["datasets"]] == [f"data/{rows}.jsonl"]
        assert config["auto_resume_from_checkpoints"] and config["use_tensorboard"] and config["val_set_size"] == 0
        assert "train.plugins.Gate" in config["plugins"]
        assert not {"special_tokens", "trust_remote_code", "wandb_project", "use_wandb", "hub_model_id"} & set(config)
        assert config["output_dir"] == f"outputs/{name}" and config["dataset_prepared_path"] == f"data/prepared/{name}"
        if config.get("rl"):  # pairs are not cut into windows, and none is held out
            assert "train.preference.MidText" in config["plugins"]
            continue
        assert [dataset["path"] for dataset in config["test_datasets"]] == [f"data/{rows}.heldout.jsonl"]
        # Drops the tails of passages, and false ends of text with them; an article's end is a true one.
        assert config.get("min_sample_len") == (None if name[0] == "3" else config["sequence_len"])
        assert config["curriculum_sampling"] and config["eval_sample_packing"] is False
        kind = "chat_template" if rows == "3b" else "completion"
        assert all(dataset["type"] == kind for dataset in [*config["datasets"], *config["test_datasets"]])


def test_the_chain_continues_one_adapter_with_its_settings() -> None:
    """PEFT takes them from the saved adapter, whatever the later recipe says."""
    first, second, third, fourth = FIRST
    assert [stage.parent for stage in FIRST] == [None, "2a", "2b", "2c"]
    assert [stage.adapter_from for stage in FIRST] == [None, None, second.output_dir, third.output_dir]
    assert first.adapter is None and {stage.base_model for stage in FIRST[1:]} == {first.output_dir}
    pattern = re.compile(r"lora_(?!model_dir)|peft_|adapter|load_in|bnb_")
    for later in (third, fourth):
        shared = [key for key in {**second.config, **later.config} if pattern.match(key) and "kernel" not in key]
        assert len(shared) >= 8 and all(second.config.get(key) == later.config.get(key) for key in shared)


def test_the_ablation_is_equal_in_all_but_what_it_leaves_out() -> None:
    articles, tuned = line_of("3b", CHAIN)
    (alone,) = line_of("3c", CHAIN)
    left_out = {"lora_model_dir", "unfrozen_parameters", "lora_modules_to_save", "peft_ensure_weight_tying"}
    own = {"output_dir", "dataset_prepared_path", "plugins"}
    keys = {key for key in {**tuned.config, **alone.config} if tuned.config.get(key) != alone.config.get(key)}
    assert keys == left_out | own and not left_out & set(alone.config)
    pattern = re.compile(r"lora_(?!model_dir)|peft_|adapter|load_in|bnb_|base_model")
    assert all(value == tuned.config[key] for key, value in articles.config.items() if pattern.match(key))


def test_rows_are_prepared_in_the_recipes_lengths() -> None:
    """Axolotl drops shorter windows and cuts longer rows elsewhere."""
    for commands in ((ROOT / "Makefile").read_text(), (ROOT / "demo/demo.sh").read_text().replace("\\\n", " ")):
        for stage in FIRST:
            lengths = re.findall(rf"--sequence-len (\d+) [^\n]*--out data/{stage.name}\.jsonl", commands)
            assert lengths == ([] if stage.config.get("rl") else [str(stage.config["sequence_len"])]), stage.name


# --- a chain is read from YAML, whatever its names -------------------------------------------------------------------


def test_another_curriculum_needs_no_code(tmp_path: Path) -> None:
    for name, base, output in (("a-tuned", "outputs/z", "outputs/a"), ("z-base", "models/base", "outputs/z")):
        config = {"base_model": base, "output_dir": output, "datasets": [{"path": "x.jsonl"}]}
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(config))
    assert [(stage.name, stage.parent) for stage in load_chain(tmp_path)] == [("z-base", None), ("a-tuned", "z-base")]


# --- overrides: another machine, the same recipe ---------------------------------------------------------------------

ALLOWED = {
    "bf16", "tf32", "attn_implementation", "plugins", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
    "gradient_checkpointing", "dataset_num_proc", "dataloader_num_workers", "max_steps", "micro_batch_size",
    "gradient_accumulation_steps", "logging_steps", "save_steps", "eval_steps", "eval_batch_size", "learning_rate", "fsdp_version", "fsdp_config",
    "deepspeed",
}  # fmt: skip


def test_overrides_are_a_closed_list() -> None:
    for name, profile in yaml.safe_load(OVERRIDES.read_text()).items():
        for section, overrides in profile.items():
            if section not in ("launch", "extends"):
                assert section in {"all", *(stage.name for stage in CHAIN)}
                assert set(overrides) <= ALLOWED, (name, section)
    # A learning rate only with its reason.
    assert not re.findall(r"^\s+learning_rate:[^#]*$", OVERRIDES.read_text(), re.M)


def test_every_profile_is_valid_and_judged(axolotl_validates: Callable) -> None:
    for name in yaml.safe_load(OVERRIDES.read_text()).keys() - {"gpu", "ddp"}:  # which override nothing
        for stage in CHAIN:
            config = stage.config | load_profile(name, stage.name)[1]
            if name == "fsdp" and config.get("rl"):
                with pytest.raises(ValueError, match="FSDP2 does not support load_in_8bit or load_in_4bit"):
                    axolotl_validates(config)
                continue
            assert axolotl_validates(config)["plugins"][-1] == "train.plugins.Gate"


def test_a_profile_without_its_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    monkeypatch.setattr("sys.argv", ["stage.py", "2a", "--recipes", str(ROOT / "recipes"), "--profile", "zero2"])
    with pytest.raises(BadInput, match="zero2 needs DeepSpeed, which is not installed: `make setup-gpu`"):
        main()


def test_slurm_starts_the_recipe_with_its_profile_on_every_node(tmp_path: Path) -> None:
    """Slurm's two commands are stand-ins: one names the nodes, the other prints what each of them would run."""
    for name, script in {"scontrol": "printf 'n1\\nn2\\n'", "srun": "printf '%s\\n' \"$@\""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "7"}
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["train/slurm.sh", "2a", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    for profile, count in {"fsdp": 2, "ddp": 0}.items():
        words = start(profile, "--wandb_project=a b").stdout.splitlines()
        assert "n1:29500" in words and words[words.index("--nproc-per-node") + 1] == "4"
        overrides = as_arguments(load_profile(profile, "2a")[1])
        assert len(overrides) == count
        assert words[words.index("recipes/2a.yml") + 1 :] == [*overrides, "--wandb_project=a b"]
    for words, message in ((["fdsp"], "-c: no profile fdsp in "), ([], "usage: sbatch ")):
        refused = start(*words)
        assert refused.returncode and not refused.stdout and message in refused.stderr
