"""The gate: what trained passes, and each way of not training is caught, with its reason."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prep.common import BadInput, sha256
from train import gate
from train.stage import check_compiler, check_tokenizer, is_whole, prepare_output
from train.stages import Stage, load_chain

RECIPES = Path(__file__).parent.parent / "recipes"
CHAIN = {stage.name: stage for stage in load_chain(RECIPES)}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def base_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": (0.02 * torch.randn(50, 8)).to(dtype),
        "model.layers.0.self_attn.q_proj.weight": (0.02 * torch.randn(8, 8)).to(dtype),
        "model.norm.weight": torch.ones(8, dtype=dtype),
    }


def adapter_tensors(b: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tensors = {}
    for module in (MODULE, MODULE.replace("q_proj", "v_proj")):
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, 8)
        tensors[f"{module}.lora_B.weight"] = torch.full((8, 4), b)
    return tensors


def write_checkpoint(stage: Stage, reached: int, planned: int) -> None:
    """A Trainer checkpoint with the final weights of the stage in it."""
    folder = stage.output_dir / f"checkpoint-{reached}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in stage.output_dir.glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    torch.save({"state": {}}, folder / "optimizer.pt")
    history = [{"step": reached, "loss": 1.0, "tokens/total": 4096}]
    state = {"global_step": reached, "max_steps": planned, "epoch": 1.0, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_started(stage: Stage) -> None:
    inputs = gate.check_inputs(stage, list(CHAIN.values()))
    (stage.output_dir / "started.json").write_text(json.dumps({"data": gate.check_data(stage), "inputs": inputs}))


def write_rows(name: str, text: str = "Il neigeait.") -> None:
    manifest = {"tokenizer": {"sha256": sha256(Path("models/base/tokenizer.json"))}}
    for part, path in (("train", Path(f"data/{name}.jsonl")), ("heldout", Path(f"data/{name}.heldout.jsonl"))):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": f"{text} {part}"}) + "\n")
        manifest[part] = {"sha256": sha256(path)}
    Path(f"data/{name}.manifest.json").write_text(json.dumps(manifest))


def train_2a(change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    write_weights(Path("outputs/2a"), {name: change(tensor).to(dtype) for name, tensor in base_tensors().items()})
    write_checkpoint(CHAIN["2a"], 20, 20)
    write_started(CHAIN["2a"])


def train_adapter(name: str, b: float, rank: int = 64, **config: object) -> None:
    stage = CHAIN[name]
    write_weights(stage.output_dir, adapter_tensors(b), "adapter_model.safetensors")
    settings = {"r": rank, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]} | config
    (stage.output_dir / "adapter_config.json").write_text(json.dumps(settings))
    write_checkpoint(stage, 10, 10)
    write_started(stage)


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base model and data, as if collected and prepared."""
    monkeypatch.chdir(tmp_path)
    write_weights(Path("models/base"), base_tensors())
    Path("models/base/tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 49}}, "added_tokens": []})
    )
    Path("models/base/config.json").write_text('{"vocab_size": 50}')
    record = {"files": gate.described(Path("models/base"))}
    Path("models/base/source.json").write_text(json.dumps(record))
    for name in CHAIN:
        write_rows(name)
    return tmp_path


def judge(name: str) -> dict:
    return gate.judge(CHAIN[name], list(CHAIN.values()))


def check(name: str) -> dict:
    return gate.check(CHAIN[name], list(CHAIN.values()))


def nudge(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1e-3


@pytest.fixture
def trained() -> None:
    """The whole chain, trained as it should be."""
    train_2a(nudge)
    judge("2a")
    train_adapter("2b", 0.01)
    judge("2b")
    train_adapter("2c", 0.02)
    judge("2c")


# --- what passes ---------------------------------------------------------------------------------------------------


def test_a_trained_chain_passes(trained: None) -> None:
    verdict = check("2c")
    assert verdict["steps"]["reached"] == verdict["steps"]["planned"] == 10
    # 32 elements of B moved from 0.01 to 0.02: norm 0.01 * sqrt(32)
    assert verdict["movement"][MODULE]["B"] == pytest.approx(0.01 * 32**0.5, rel=1e-3)
    assert verdict["movement"][MODULE]["A"] == 0


def test_movement_is_measured_per_tensor() -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.clone()
        if moved.shape == (8, 8):
            moved[:6] *= 2  # three quarters of the elements
        if moved.shape == (50, 8):
            moved[0] += 1.0
        return moved

    train_2a(change)
    movement = judge("2a")["movement"]
    matrix = movement["model.layers.0.self_attn.q_proj.weight"]
    weight = base_tensors()["model.layers.0.self_attn.q_proj.weight"]
    assert matrix["changed"] == 0.75
    assert matrix["relative"] == pytest.approx((weight[:6].norm() / weight.norm()).item(), rel=1e-3)
    assert movement["model.embed_tokens.weight"]["changed"] == pytest.approx(1 / 50)
    assert movement["model.norm.weight"] == {"kind": "vector", "changed": 0.0, "relative": 0.0}


def test_a_stage_trained_by_the_plain_command_counts(trained: None) -> None:
    for name in ("2a", "2b", "2c"):
        (CHAIN[name].output_dir / "started.json").unlink()
        CHAIN[name].verdict.unlink()
        logs = CHAIN[name].output_dir / "runs" / "x"
        logs.mkdir(parents=True)
        (logs / f"events.out.tfevents.{int(time.time()) + 5}.host.1.0").touch()
    assert check("2c")["stage"] == "2c"


# --- what does not -------------------------------------------------------------------------------------------------


def test_nothing_there() -> None:
    with pytest.raises(gate.NotTrained, match="make stage-a"):
        judge("2a")


def test_weights_that_did_not_move() -> None:
    train_2a(lambda tensor: tensor.clone())
    with pytest.raises(gate.NotTrained, match=r"hardly trained .*0\.00%"):
        judge("2a")
    assert not CHAIN["2a"].verdict.exists()


def test_one_frozen_matrix_is_enough() -> None:
    train_2a(lambda tensor: tensor.clone() if tensor.shape == (8, 8) else nudge(tensor))
    with pytest.raises(gate.NotTrained, match=r"hardly trained model\.layers\.0\.self_attn\.q_proj"):
        judge("2a")


def test_a_cast_is_no_training() -> None:
    """float32 -> bf16 changes nearly every element; compared in bf16 none has changed."""
    train_2a(lambda tensor: tensor.clone(), torch.bfloat16)
    with pytest.raises(gate.NotTrained, match="hardly trained"):
        judge("2a")


def test_updates_that_bf16_swallows() -> None:
    """A change of 1e-5 on weights of 0.02 rounds away in bf16 for all but the smallest weights."""
    train_2a(lambda tensor: tensor.bfloat16() + torch.tensor(1e-5).bfloat16(), torch.bfloat16)
    with pytest.raises(gate.NotTrained, match="bf16 rounding"):
        judge("2a")


def test_nan() -> None:
    train_2a(lambda tensor: tensor * float("nan"))
    with pytest.raises(gate.NotTrained, match="diverged"):
        judge("2a")


def test_cut_short() -> None:
    train_2a(nudge)
    (CHAIN["2a"].output_dir / "checkpoint-20").rename(CHAIN["2a"].output_dir / "checkpoint-8")
    write_checkpoint(CHAIN["2a"], 8, 20)
    with pytest.raises(gate.NotTrained, match="cut short: step 8 of 20"):
        judge("2a")


def test_half_trained_weights_under_the_final_name() -> None:
    """What Axolotl leaves after Ctrl-C in a resumed run: a whole checkpoint, and other weights beside it."""
    train_2a(nudge)
    write_weights(Path("outputs/2a"), {name: tensor + 5e-3 for name, tensor in base_tensors().items()})
    with pytest.raises(gate.NotTrained, match="is not what checkpoint-20 saved"):
        judge("2a")


def test_new_adapter_still_zero(trained: None) -> None:
    train_adapter("2b", 0.0)
    with pytest.raises(gate.NotTrained, match="is still zero"):
        judge("2b")


def test_continued_adapter_that_was_frozen(trained: None) -> None:
    train_adapter("2c", 0.01)
    with pytest.raises(gate.NotTrained, match=r"trained nothing in .*still that of outputs/2b"):
        judge("2c")


def test_continued_adapter_frozen_in_one_module(trained: None) -> None:
    path = Path("outputs/2c/adapter_model.safetensors")
    tensors = load_file(path)
    tensors[f"{MODULE}.lora_B.weight"] = torch.full((8, 4), 0.01)
    save_file(tensors, path)
    write_checkpoint(CHAIN["2c"], 10, 10)
    with pytest.raises(gate.NotTrained, match="q_proj"):
        judge("2c")


def test_continued_adapter_of_another_rank(trained: None) -> None:
    train_adapter("2c", 0.02, rank=8)
    with pytest.raises(gate.NotTrained, match="r is 8, it was 64"):
        judge("2c")


def test_continued_adapter_with_other_targets(trained: None) -> None:
    train_adapter("2c", 0.02, target_modules=["q_proj"])
    with pytest.raises(gate.NotTrained, match="other modules"):
        judge("2c")


def test_base_that_was_written_over(trained: None) -> None:
    write_weights(Path("models/base"), {name: tensor * 2 for name, tensor in base_tensors().items()})
    with pytest.raises(
        BadInput, match=r"models/base/model\.safetensors is not the file that .*source\.json vouches for"
    ):
        check("2a")


def test_earlier_stage_that_was_trained_again(trained: None) -> None:
    train_2a(lambda tensor: tensor + 2e-3)
    judge("2a")
    with pytest.raises(BadInput, match="built on other weights"):
        check("2b")


@pytest.mark.parametrize("name", ["2a", "2b", "2c"])
def test_data_that_has_changed_since(trained: None, name: str) -> None:
    write_rows(name, "Il pleuvait.")
    with pytest.raises(gate.NotTrained, match="changed since"):
        check(name)
    CHAIN[name].verdict.unlink()
    with pytest.raises(gate.NotTrained, match="changed since"):
        check(name)


def test_data_that_its_manifest_does_not_vouch_for(trained: None) -> None:
    with Path("data/2a.jsonl").open("a") as handle:
        handle.write('{"text": "une ligne de plus"}\n')
    with pytest.raises(BadInput, match="make prep-a"):
        check("2a")


def test_plain_command_on_data_that_is_younger(trained: None) -> None:
    stage = CHAIN["2a"]
    (stage.output_dir / "started.json").unlink()
    stage.verdict.unlink()
    (stage.output_dir / "runs").mkdir()
    (stage.output_dir / "runs" / f"events.out.tfevents.{int(time.time()) - 1000}.host.1.0").touch()
    with pytest.raises(gate.NotTrained, match="younger than the training"):
        check("2a")


def test_plain_command_on_a_stale_cache(trained: None) -> None:
    stage = CHAIN["2a"]
    (stage.output_dir / "started.json").unlink()
    stage.verdict.unlink()
    (stage.output_dir / "runs").mkdir()
    (stage.output_dir / "runs" / f"events.out.tfevents.{int(time.time()) + 5}.host.1.0").touch()
    cache = Path("data/prepared/2a/abc")
    cache.mkdir(parents=True)
    (cache / "data-00000-of-00001.arrow").touch()
    old = time.time() - 1000
    os.utime(cache / "data-00000-of-00001.arrow", (old, old))
    with pytest.raises(gate.NotTrained, match="prepared from older rows"):
        check("2a")


@pytest.mark.parametrize("damage", ["", "{", '{"stage": "2a"}'])
def test_a_damaged_verdict(trained: None, damage: str) -> None:
    CHAIN["2a"].verdict.write_text(damage)
    with pytest.raises(gate.NotTrained, match="damaged"):
        check("2c")


def test_damaged_weights() -> None:
    train_2a(nudge)
    path = Path("outputs/2a/model.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    write_checkpoint(CHAIN["2a"], 20, 20)
    with pytest.raises(gate.NotTrained, match="damaged"):
        judge("2a")


def test_weights_swapped_after_the_verdict(trained: None) -> None:
    write_weights(Path("outputs/2a"), {name: tensor + 3e-3 for name, tensor in base_tensors().items()})
    with pytest.raises(gate.NotTrained, match="not those that passed"):
        check("2a")


def test_inputs_that_changed_during_the_training(trained: None) -> None:
    started = Path("outputs/2b/started.json")
    plan = json.loads(started.read_text())
    plan["inputs"]["outputs/2a"]["model.safetensors"] = "0"
    started.write_text(json.dumps(plan))
    with pytest.raises(gate.NotTrained, match="outputs/2a changed while stage 2b was trained"):
        judge("2b")


def test_a_checkpoint_without_its_state() -> None:
    train_2a(nudge)
    Path("outputs/2a/checkpoint-20/trainer_state.json").write_text('{"global_step": 20')
    with pytest.raises(gate.NotTrained, match="not written to its end"):
        judge("2a")


def test_a_checkpoint_without_final_weights() -> None:
    train_2a(nudge)
    Path("outputs/2a/model.safetensors").unlink()
    with pytest.raises(gate.NotTrained, match="holds no weights"):
        judge("2a")


def test_nothing_says_when_it_was_trained(trained: None) -> None:
    Path("outputs/2a/started.json").unlink()
    with pytest.raises(gate.NotTrained, match="nothing says when"):
        judge("2a")


def swap(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors that a finished stage wrote, in the final weights and in the last checkpoint."""
    stage = CHAIN[name]
    (path,) = stage.output_dir.glob("*.safetensors")
    save_file(change(load_file(path)), path)
    write_checkpoint(stage, *(20, 20) if name == "2a" else (10, 10))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("2a", lambda old: {k: v for k, v in old.items() if "norm" not in k}, "lacks 1 tensors"),
        ("2a", lambda old: old | {"extra.weight": torch.ones(2, 2)}, "no counterpart"),
        ("2a", lambda old: old | {"model.norm.weight": torch.ones(9)}, "no counterpart"),
        ("2b", lambda old: old | {"odd.weight": torch.ones(2)}, "no LoRA tensor"),
        ("2b", lambda old: {k: v * float("inf") for k, v in old.items()}, "diverged"),
        ("2b", lambda old: {k: v for k, v in old.items() if "q_proj.lora_A" not in k}, "has only lora_B"),
        ("2c", lambda old: {k: v for k, v in old.items() if "q_proj" not in k}, "lacks 2 tensors"),
        ("2c", lambda old: {k.replace("q_proj", "k_proj"): v for k, v in old.items()}, "another shape or target"),
        ("2c", lambda old: {k: v[:2].contiguous() if "lora_A" in k else v for k, v in old.items()}, "another shape"),
    ],
)
def test_tensors_that_do_not_belong(trained: None, name: str, change: Callable, message: str) -> None:
    swap(name, change)
    with pytest.raises(gate.NotTrained, match=message):
        judge(name)


# --- before a stage starts ---------------------------------------------------------------------------------------


def test_adapter_of_another_rank_is_refused(trained: None) -> None:
    train_adapter("2b", 0.01, rank=16)
    with pytest.raises(BadInput, match=r"r is 16, but .*2c\.yml says lora_r: 64"):
        gate.check_adapter_settings(CHAIN["2c"])


def test_tokenizer_of_the_rows_must_be_the_models() -> None:
    chain = list(CHAIN.values())
    check_tokenizer(CHAIN["2c"], chain)
    Path("models/base/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    with pytest.raises(BadInput, match=r"another tokenizer .* `make prep-c`"):
        check_tokenizer(CHAIN["2c"], chain)


def test_tokenizer_too_large_for_the_model() -> None:
    Path("models/base/config.json").write_text('{"vocab_size": 49}')
    with pytest.raises(BadInput, match="a token 49, the model a vocabulary of 49"):
        check_tokenizer(CHAIN["2a"], list(CHAIN.values()))


@pytest.mark.parametrize("damaged", ["trainer_state.json", "model.safetensors", "optimizer.pt"])
def test_torn_checkpoints_are_not_resumed(damaged: str) -> None:
    train_2a(nudge)
    checkpoint = Path("outputs/2a/checkpoint-20")
    assert is_whole(checkpoint)
    whole = (checkpoint / damaged).read_bytes()
    (checkpoint / damaged).write_bytes(whole[: len(whole) // 2])
    assert not is_whole(checkpoint)
    prepare_output(CHAIN["2a"], {"data": {}})
    assert not checkpoint.exists()


def test_checkpoints_of_a_run_on_other_data_are_not_resumed() -> None:
    train_2a(nudge)
    plan = json.loads(Path("outputs/2a/started.json").read_text())
    prepare_output(CHAIN["2a"], plan)
    with pytest.raises(BadInput, match="a run with other data"):
        prepare_output(CHAIN["2a"], plan | {"data": {"data/2a.jsonl": "0"}})


def test_an_adapter_that_is_not_there(trained: None) -> None:
    Path("outputs/2b/adapter_config.json").unlink()
    with pytest.raises(BadInput, match="no adapter to continue"):
        gate.check_adapter_settings(CHAIN["2c"])


def test_a_base_that_is_not_there() -> None:
    Path("models/base/source.json").unlink()
    with pytest.raises(BadInput, match=r"needs models/base.*make data"):
        gate.check_inputs(CHAIN["2a"], list(CHAIN.values()))


def test_a_stage_without_its_verdict_is_no_input(trained: None) -> None:
    CHAIN["2a"].verdict.unlink()
    with pytest.raises(BadInput, match="has not passed its gate"):
        gate.check_inputs(CHAIN["2b"], list(CHAIN.values()))


def test_a_damaged_record_of_the_base() -> None:
    Path("models/base/source.json").write_text('{"files": [')
    with pytest.raises(BadInput, match=r"source\.json is damaged"):
        gate.check_inputs(CHAIN["2a"], list(CHAIN.values()))


@pytest.mark.parametrize("missing", ["data/2a.jsonl", "data/2a.heldout.jsonl", "data/2a.manifest.json"])
def test_rows_that_are_not_there(missing: str) -> None:
    Path(missing).unlink()
    with pytest.raises(BadInput, match=rf"{missing} is missing; `make prep-a`"):
        gate.check_data(CHAIN["2a"])


def test_a_damaged_manifest() -> None:
    Path("data/2a.manifest.json").write_text("{")
    with pytest.raises(BadInput, match="is damaged"):
        gate.check_data(CHAIN["2a"])


def test_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gate.py", "--recipes", str(RECIPES)])
    with pytest.raises(BadInput, match="make stage-a"):
        gate.main()


def test_a_missing_compiler_is_said_before_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first step would fail otherwise, minutes later and a hundred lines long."""
    monkeypatch.delenv("CXX", raising=False)
    check_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match=r"no C\+\+ compiler \(g\+\+\)"):
        check_compiler()
    named = tmp_path / "my-compiler"
    named.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(named))
    check_compiler()


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, content in (("a", b"one"), ("b", b"two")):
        path = tmp_path / folder / "model.safetensors"
        path.parent.mkdir()
        path.write_bytes(content)
        os.utime(path, (1, 1))
    name = Path("model.safetensors")
    monkeypatch.chdir(tmp_path / "a")
    first, reads = gate.hashed(name), gate._hash_of.cache_info().misses
    assert gate.hashed(name) == first == sha256(name)
    assert gate._hash_of.cache_info().misses == reads
    monkeypatch.chdir(tmp_path / "b")  # the same name, size and time elsewhere is another file
    assert gate.hashed(name) == sha256(name) != first
    monkeypatch.chdir(tmp_path / "a")
    name.write_bytes(b"six")
    assert gate.hashed(name) == sha256(name) != first
