"""The recipes: parsed by Axolotl itself, no key that nothing reads, one chain from the base to the novel."""

import re
from pathlib import Path

import pytest
import yaml

from prep.common import BadInput
from train.stage import OVERRIDES, as_arguments, load_profile
from train.stages import Stage, line_of, load_chain, load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yml"))
CHAIN = load_chain(ROOT / "recipes")
# The card a recipe is written for: 12 GB, Ampere.
GPU = {"bf16": True, "tf32": True, "fp8": False, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_86"}


def axolotl_fields(config: dict) -> dict:
    """Fields of Axolotl's input model, with the arguments of the plugins that `config` lists."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.config import AxolotlConfigWCapabilities

    fields = dict(AxolotlConfigWCapabilities.model_fields)
    manager = PluginManager.get_instance()
    for plugin in config.get("plugins", []):
        manager.register(plugin)
        if arguments := manager.plugins[plugin].get_input_args():
            module, name = arguments.rsplit(".", 1)
            fields |= getattr(__import__(module, fromlist=[name]), name).model_fields
    return fields


def unknown_keys(config: dict) -> list[str]:
    """Keys of a recipe, and of its data sets, that Axolotl would ignore without a word."""
    from axolotl.utils.schemas.datasets import SFTDataset

    def known(fields: dict) -> set[str]:
        return set(fields) | {field.alias for field in fields.values() if field.alias}

    unknown = set(config) - known(axolotl_fields(config))
    for dataset in [*config["datasets"], *config["test_datasets"]]:
        unknown |= set(dataset) - known(SFTDataset.model_fields)
    return sorted(unknown)


def validate(config: dict) -> dict:
    """What Axolotl's own validation makes of a recipe on a GPU."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(config)
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=GPU, env_capabilities={"torch_version": "2.13.0"})


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> dict:
    return load_recipe(request.param)


def test_three_recipes_are_found() -> None:
    assert [stage.name for stage in CHAIN] == ["2a", "2b", "2c"]


def test_axolotl_accepts_it(config: dict) -> None:
    validated = validate(config)
    assert validated["sequence_len"] == config["sequence_len"]
    assert validated["learning_rate"] == float(config["learning_rate"])


def test_axolotl_accepts_it_without_held_out_rows(config: dict) -> None:
    """What train/stage.py says when the rows were prepared with --holdout 0."""
    assert not validate(config | {"test_datasets": None, "eval_steps": None})["test_datasets"]


def test_axolotl_refuses_what_cannot_work(config: dict) -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        validate(config | {"micro_batch_size": "many"})


def test_no_key_is_ignored(config: dict) -> None:
    assert unknown_keys(config) == []


def test_misspelt_keys_are_found(config: dict) -> None:
    wrong = config | {"learning_rat": 1e-4, "datasets": [config["datasets"][0] | {"tpye": "completion"}]}
    assert unknown_keys(wrong) == ["learning_rat", "tpye"]


def test_keys_of_a_plugin_that_is_not_listed_are_found(config: dict) -> None:
    assert "liger_rope" in unknown_keys({key: value for key, value in config.items() if key != "plugins"})


def test_one_stem_runs_through(config: dict, request: pytest.FixtureRequest) -> None:
    stem = request.node.callspec.params["config"].stem
    assert [dataset["path"] for dataset in config["datasets"]] == [f"data/{stem}.jsonl"]
    assert [dataset["path"] for dataset in config["test_datasets"]] == [f"data/{stem}.heldout.jsonl"]
    assert config["output_dir"] == f"outputs/{stem}"
    assert config["dataset_prepared_path"] == f"data/prepared/{stem}"


def test_what_every_stage_shares(config: dict) -> None:
    assert config["min_sample_len"] == config["sequence_len"]  # drops tails, and false ends of text with them
    assert config["auto_resume_from_checkpoints"] and config["use_tensorboard"]
    assert config["val_set_size"] == 0 and config["eval_sample_packing"] is False
    assert all(dataset["type"] == "completion" for dataset in [*config["datasets"], *config["test_datasets"]])
    assert not {"special_tokens", "trust_remote_code", "wandb_project", "use_wandb", "hub_model_id"} & set(config)


def test_the_chain() -> None:
    first, second, third = CHAIN
    assert first.parent is None and first.adapter is None
    assert second.parent == first.name and second.base_model == first.output_dir and second.adapter == "qlora"
    assert third.parent == second.name and third.base_model == first.output_dir
    assert third.adapter_from == second.output_dir
    assert [stage.name for stage in line_of("2c", CHAIN)] == ["2a", "2b", "2c"]


def test_a_continued_adapter_keeps_its_settings() -> None:
    """PEFT takes them from the saved adapter, whatever the later recipe says."""
    stages = {stage.output_dir: stage for stage in CHAIN}
    for stage in CHAIN:
        if stage.adapter_from:
            earlier = stages[stage.adapter_from].config
            shared = {
                key for key in earlier | stage.config if re.match(r"lora_(?!model_dir)|peft_|adapter|load_in|bnb_", key)
            }
            assert len(shared) >= 8
            assert {key: stage.config.get(key) for key in shared} == {key: earlier.get(key) for key in shared}


def test_steps_in_comments_are_true() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for stage in CHAIN[:2]:
        windows = int(re.search(rf"--windows (\d+) .*data/{stage.name}\.jsonl", makefile)[1])  # type: ignore[index]
        step = (
            stage.config["micro_batch_size"]
            * stage.config["gradient_accumulation_steps"]
            * stage.config["sequence_len"]
        )
        text = stage.recipe.read_text()
        assert f"= {step:,} tokens a step" in text
        assert f"= {windows * stage.config['sequence_len'] // step:,} steps" in text
        assert f"{windows:,} windows x {stage.config['sequence_len']}" in text


def test_rows_are_cut_for_the_recipes() -> None:
    """The Makefile and the demo give prep the sequence length of the recipe that reads the rows."""
    for path in (ROOT / "Makefile", ROOT / "demo" / "demo.sh"):
        text = path.read_text().replace("\\\n", " ")
        for stage in CHAIN:
            lengths = re.findall(rf"--sequence-len (\d+) [^\n]*--out data/{stage.name}\.jsonl", text)
            assert lengths == [str(stage.config["sequence_len"])], (path, stage.name)


# --- a chain is read from YAML, whatever its names ---------------------------------------------------------------


def write_recipe(folder: Path, name: str, **config: object) -> None:
    (folder / f"{name}.yml").write_text(yaml.safe_dump({"datasets": [{"path": "x.jsonl"}], **config}))


def test_another_curriculum_needs_no_code(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a-tuned", base_model="outputs/z", output_dir="outputs/a")
    write_recipe(tmp_path, "z-base", base_model="models/base", output_dir="outputs/z")
    assert [(stage.name, stage.parent) for stage in load_chain(tmp_path)] == [("z-base", None), ("a-tuned", "z-base")]


def test_a_chain_in_a_circle_is_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path, "1", base_model="outputs/2", output_dir="outputs/1")
    write_recipe(tmp_path, "2", base_model="outputs/1", output_dir="outputs/2")
    with pytest.raises(BadInput, match="circle"):
        load_chain(tmp_path)


def test_two_recipes_with_one_output_are_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path, "1", base_model="models/base", output_dir="outputs/1")
    write_recipe(tmp_path, "2", base_model="models/base", output_dir="outputs/1")
    with pytest.raises(BadInput, match="already that of recipe 1"):
        load_chain(tmp_path)


@pytest.mark.parametrize("text", ["", "- a list\n", "base_model: models/base\n", "a: [\n"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "1.yml").write_text(text)
    with pytest.raises(BadInput, match=r"1\.yml"):
        load_chain(tmp_path)


def test_no_recipes_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no recipe"):
        load_chain(tmp_path)


# --- overrides ----------------------------------------------------------------------------------------------------

ALLOWED = {
    "bf16", "tf32", "attn_implementation", "plugins", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
    "gradient_checkpointing", "dataset_num_proc", "dataloader_num_workers", "max_steps", "micro_batch_size",
    "gradient_accumulation_steps", "logging_steps", "save_steps", "eval_steps", "learning_rate",
}  # fmt: skip


def forbidden(profiles: dict) -> list[str]:
    """What a profile overrides although it is the recipe's own."""
    found = []
    for name, profile in profiles.items():
        for section, overrides in profile.items():
            if section not in ("launch", "extends"):
                found += [f"{name}.{section}.{key}" for key in overrides if key not in ALLOWED]
    return found


def test_overrides_are_a_closed_list() -> None:
    profiles = yaml.safe_load(OVERRIDES.read_text())
    assert forbidden(profiles) == []
    for profile in profiles.values():
        sections = set(profile) - {"launch", "extends", "all"}
        assert sections <= {stage.name for stage in CHAIN}


@pytest.mark.parametrize("key", ["lora_r", "optimizer", "sequence_len", "output_dir", "adapter", "datasets"])
def test_overrides_of_the_recipe_itself_are_found(key: str) -> None:
    assert forbidden({"demo": {"2a": {key: 1, "max_steps": 3}}}) == [f"demo.2a.{key}"]


def test_a_learning_rate_override_has_its_reason() -> None:
    for line in OVERRIDES.read_text().splitlines():
        assert not re.match(r"\s+learning_rate:[^#]*$", line), line


def test_a_profile_extends_another() -> None:
    launch, overrides = load_profile("smoke", "2b")
    assert "--cpu" in launch and overrides["bf16"] is False and overrides["max_steps"] == 4
    assert "--plugins=['train.seed.SeedAdapter']" in as_arguments(overrides)
    assert "--plugins=[]" in as_arguments(load_profile("smoke", "2c")[1])


def test_an_unknown_profile_is_said() -> None:
    with pytest.raises(BadInput, match="no profile tpu"):
        load_profile("tpu", "2a")


def test_every_profile_passes_axolotls_validation() -> None:
    for name in yaml.safe_load(OVERRIDES.read_text()):
        for stage in CHAIN:
            assert isinstance(stage, Stage)
            _, overrides = load_profile(name, stage.name)
            validate(stage.config | overrides)
