"""The gate: what trained passes; each way of not training is refused with its reason; the plugin calls it on every launch."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from prep.common import BadInput, is_whole, seal, sha256
from train import gate
from train.resume import take_weights
from train.stage import check_compiler
from train.stages import load_chain

RECIPES = Path(__file__).parent.parent / "recipes"
STAGES = load_chain(RECIPES)
CHAIN = {stage.name: stage for stage in STAGES}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


# --- a working directory as if collected, prepared and trained -------------------------------------------------------


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def base_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": 0.02 * torch.randn(50, 8),
        "model.layers.0.self_attn.q_proj.weight": 0.02 * torch.randn(8, 8),
        "model.norm.weight": torch.ones(8),
    }


def adapter_tensors(b: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    modules = (MODULE, MODULE.replace("q_proj", "v_proj"))
    a = {f"{module}.lora_A.weight": torch.randn(4, 8) for module in modules}
    return a | {f"{module}.lora_B.weight": torch.full((8, 4), b) for module in modules}


def write_checkpoint(name: str, reached: int = 20, planned: int = 20) -> None:
    """A Trainer checkpoint with the final weights of the stage in it."""
    output = CHAIN[name].output_dir
    folder = output / f"checkpoint-{reached}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*output.glob("*.safetensors"), *output.glob("adapter_config.json")]:
        (folder / path.name).write_bytes(path.read_bytes())
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": {}}, folder / file)
    history = [{"step": reached, "loss": 1.0, "tokens/total": 4096}]
    state = {"global_step": reached, "max_steps": planned, "epoch": 1.0, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    seal(folder)


def write_rows(name: str, text: str = "Il neigeait.") -> None:
    manifest: dict[str, Any] = {"tokenizer": {"sha256": sha256(Path("models/base/tokenizer.json"))}}
    for part, path in (("train", Path(f"data/{name}.jsonl")), ("heldout", Path(f"data/{name}.heldout.jsonl"))):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": f"{text} {part}"}) + "\n")
        manifest[part] = {"sha256": sha256(path)}
    if name == "2c":
        Path("data/2c.txt").write_text(text)
        manifest["documents"] = {"text": {"path": "2c.txt", "sha256": sha256("data/2c.txt")}}
    Path(f"data/{name}.manifest.json").write_text(json.dumps(manifest))


def start(name: str) -> None:
    ready = {"data": gate.check_data(CHAIN[name]), "inputs": gate.check_inputs(CHAIN[name], STAGES)}
    (CHAIN[name].output_dir / "started.json").write_text(json.dumps(ready))


def train_2a(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    write_weights(Path("outputs/2a"), {name: change(tensor) for name, tensor in base_tensors().items()})
    write_checkpoint("2a")
    start("2a")


COPIES = ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight")


def train_adapter(name: str, b: float, *shifts: float, **config: object) -> None:
    """An adapter `b` from zero; of 3a and 3b also copies of head and embedding that are `shifts` from zero."""
    recipe, output = CHAIN[name].config, CHAIN[name].output_dir
    copies = {copy: torch.full((50, 8), shift) for copy, shift in zip(COPIES, shifts, strict=False)}
    write_weights(output, adapter_tensors(b) | copies, "adapter_model.safetensors")
    if not recipe.get("lora_model_dir"):
        new = adapter_tensors(0.0) | {copy: torch.zeros(50, 8) for copy in copies}
        write_weights(output / "start", new, "adapter_model.safetensors")
    settings = {said: recipe.get(key, False) for key, said in gate.ADAPTER_SETTINGS.items()}
    settings |= {"target_modules": ["q_proj", "v_proj"], "modules_to_save": recipe.get(gate.COPIES)} | config
    (output / "adapter_config.json").write_text(json.dumps(settings))
    write_checkpoint(name)
    start(name)


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for base in (Path("models/base"), Path("models/instruct")):
        write_weights(base, base_tensors())
        (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 49}}, "added_tokens": []}))
        (base / "config.json").write_text('{"vocab_size": 50}')
        (base / "source.json").write_text(json.dumps({"files": gate.described(base)}))
    for name in CHAIN:
        write_rows(name)
    return tmp_path


@pytest.fixture
def trained() -> None:
    train_2a(nudge)
    judge("2a")
    train_adapter("2b", 0.01)
    judge("2b")
    train_adapter("2c", 0.02)
    judge("2c")


def judge(name: str) -> dict[str, Any]:
    return gate.judge(CHAIN[name], STAGES)


def check(name: str) -> dict[str, Any]:
    return gate.check(CHAIN[name], STAGES)


def nudge(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1e-3


def rewrite(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors that a finished stage wrote, in the final weights and in the last checkpoint."""
    (path,) = CHAIN[name].output_dir.glob("*.safetensors")
    save_file(change(load_file(path)), path)
    write_checkpoint(name)


# --- what passes -----------------------------------------------------------------------------------------------------


def test_a_trained_chain_passes(trained: None) -> None:
    verdict = check("2c")
    assert verdict["steps"]["reached"] == verdict["steps"]["planned"] == 20
    # 32 elements of B moved from 0.01 to 0.02: norm 0.01 * sqrt(32)
    assert verdict["movement"][MODULE] == {"A": 0, "B": pytest.approx(0.01 * 32**0.5, rel=1e-3)}


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
    weight = base_tensors()["model.layers.0.self_attn.q_proj.weight"]
    relative = pytest.approx((weight[:6].norm() / weight.norm()).item(), rel=1e-3)
    assert movement["model.layers.0.self_attn.q_proj.weight"] == {
        "kind": "matrix", "changed": 0.75, "relative": relative,
    }  # fmt: skip
    assert movement["model.embed_tokens.weight"]["changed"] == pytest.approx(1 / 50)
    assert movement["model.norm.weight"] == {"kind": "vector", "changed": 0.0, "relative": 0.0}


# --- what does not ---------------------------------------------------------------------------------------------------

FULL = [
    (lambda tensor: tensor.clone(), r"hardly trained .*0\.00%"),
    (lambda tensor: tensor.clone() if tensor.shape == (8, 8) else nudge(tensor), r"hardly trained model\.layers\.0"),
    # A cast changes nearly every element; compared in bf16 none has changed.
    (lambda tensor: tensor.bfloat16(), "hardly trained"),
    # 1e-5 on weights of 0.02 is lost in bf16 for all but the smallest of them.
    (lambda tensor: tensor.bfloat16() + torch.tensor(1e-5).bfloat16(), "bf16 rounding"),
    (lambda tensor: tensor * float("nan"), "diverged"),
]


@pytest.mark.parametrize(("change", "message"), FULL, ids=["nothing", "one frozen", "cast", "rounding", "nan"])
def test_full_weights_that_did_not_train(change: Callable, message: str) -> None:
    train_2a(change)
    with pytest.raises(BadInput, match=message):
        judge("2a")
    assert not CHAIN["2a"].verdict.exists()


@pytest.mark.parametrize(
    ("name", "b", "config", "message"),
    [
        ("2b", 0.0, {}, r"trained nothing in .*still that of outputs/2b/start"),
        ("2c", 0.01, {}, r"trained nothing in .*still that of outputs/2b"),
        ("2c", 0.02, {"r": 8}, r"r is 8, but .*2c\.yml says lora_r: 64"),
        ("2c", 0.02, {"use_rslora": False}, "use_rslora is False"),
    ],
)
def test_adapters_that_did_not_train(trained: None, name: str, b: float, config: dict, message: str) -> None:
    train_adapter(name, b, **config)
    with pytest.raises(BadInput, match=message):
        judge(name)


def without(part: str) -> Callable:
    return lambda old: {name: tensor for name, tensor in old.items() if part not in name}


TENSORS = [
    ("2a", without("norm"), "lacks 1 tensors"),
    ("2a", lambda old: old | {"model.norm.weight": torch.ones(9)}, "not the same model"),
    ("2b", lambda old: old | {"odd.weight": torch.ones(2)}, "not the same model or adapter"),
    ("2b", lambda old: {name: tensor * float("inf") for name, tensor in old.items()}, "diverged"),
    ("2b", without("q_proj.lora_A"), "lacks 1 tensors"),
    ("2c", lambda old: {name.replace("q_proj", "k_proj"): tensor for name, tensor in old.items()}, "not the same"),
    ("2c", lambda old: {n: t[:2].contiguous() if "lora_A" in n else t for n, t in old.items()}, "not the same"),
    ("2c", lambda old: old | {f"{MODULE}.lora_B.weight": torch.full((8, 4), 0.01)}, "trained nothing in .*q_proj"),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSORS)
def test_tensors_that_do_not_belong(trained: None, name: str, change: Callable, message: str) -> None:
    rewrite(name, change)
    with pytest.raises(BadInput, match=message):
        judge(name)


def test_a_run_that_is_not_at_its_planned_step() -> None:
    train_2a(nudge)
    Path("outputs/2a/checkpoint-20").rename("outputs/2a/checkpoint-8")
    for reached in (8, 21):
        write_checkpoint("2a", reached)
        with pytest.raises(BadInput, match=f"stopped at step {reached} of 20"):
            judge("2a")


def test_half_trained_or_damaged_weights_under_the_final_name() -> None:
    """What Axolotl leaves after Ctrl-C in a resumed run: a complete checkpoint, and other weights beside it."""
    train_2a(nudge)
    write_weights(Path("outputs/2a"), {name: tensor + 5e-3 for name, tensor in base_tensors().items()})
    with pytest.raises(BadInput, match="is not what checkpoint-20 saved"):
        judge("2a")
    path = Path("outputs/2a/model.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    write_checkpoint("2a")  # with the same damage
    with pytest.raises(BadInput, match="damaged"):
        judge("2a")


def damage(path: str, text: str | None) -> Callable[[], Any]:
    return lambda: Path(path).unlink() if text is None else Path(path).write_text(text)


DAMAGED = [
    (damage("outputs/2a/model.safetensors", "half"), "is not what checkpoint-20 saved"),
    (damage("outputs/2a/started.json", None), "started.json is missing; remove outputs/2a"),
    (damage("outputs/2a/started.json", '{"data": {}}'), "started.json is damaged"),
    (lambda: write_rows("2a", "Il pleuvait."), "data of stage 2a changed since .*started.json was written"),
    (damage("data/2a.jsonl", '{"text": "autre"}\n'), "is not the file that .*`make prep-a`"),
    (damage("data/2a.jsonl", None), "2a.jsonl is missing; `make prep-a`"),
    (damage("data/2a.heldout.jsonl", None), "2a.heldout.jsonl is missing; `make prep-a`"),
    (damage("data/2a.manifest.json", "{"), "2a.manifest.json is damaged; `make prep-a`"),
    (damage("models/base/source.json", '{"files": ['), "source.json is damaged; `make data`"),
    (damage("models/base/model.safetensors", "another"), "model.safetensors is not the file that .*source.json"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_files_that_are_not_what_they_were(change: Callable[[], None], message: str) -> None:
    train_2a(nudge)
    change()
    with pytest.raises(BadInput, match=message):
        judge("2a")


# --- full copies of embedding and head beside an adapter, and the best checkpoint --------------------------------------


def test_copies_that_moved_and_then_did_not_pass() -> None:
    train_adapter("3a", 0.01, 1e-3, 1e-3)
    verdict = judge("3a")
    assert verdict["movement"][COPIES[0].removesuffix(".weight")]["changed"] == 1.0
    assert "2 full copies, at least 100.0% changed" in gate.describe(verdict)
    train_adapter("3b", 0.02, 1e-3, 1e-3)
    verdict = judge("3b")
    assert verdict["movement"][COPIES[1].removesuffix(".weight")]["changed"] == 0.0


@pytest.mark.parametrize(
    ("name", "shifts", "config", "message"),
    [
        ("3a", (1e-3, 0.0), {}, r"hardly trained .*embed_tokens: 0\.00%"),
        ("3a", (0.0, 1e-3), {}, "hardly trained .*lm_head"),
        ("3b", (1e-3, 2e-3), {}, "changed .*embed_tokens, which its `unfrozen_parameters` freezes"),
        (
            "3b",
            (1e-3, 1e-3),
            {"modules_to_save": None},
            r"has full copies of \[\], but .*3b\.yml says lora_modules_to_save",
        ),
    ],
)
def test_copies_that_did_not_do_what_their_recipe_says(name: str, shifts: tuple, config: dict, message: str) -> None:
    train_adapter("3a", 0.01, 1e-3, 1e-3)
    if name == "3b":
        judge("3a")
    train_adapter(name, 0.02, *shifts, **config)
    with pytest.raises(BadInput, match=message):
        judge(name)


def test_a_stage_may_end_with_its_best_checkpoint() -> None:
    train_adapter("3a", 0.01, 1e-3, 1e-3)
    judge("3a")
    train_adapter("3b", 0.02, 1e-3, 1e-3)
    output = CHAIN["3b"].output_dir
    (output / "checkpoint-20").rename(output / "checkpoint-10")
    train_adapter("3b", 0.03, 1e-3, 1e-3)
    with pytest.raises(BadInput, match="is not what checkpoint-10 saved at the best step"):
        state = output / "checkpoint-20/trainer_state.json"
        state.write_text(
            json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": str(output / "checkpoint-10")})
        )
        judge("3b")
    take_weights(CHAIN["3b"])
    assert judge("3b")["steps"] == judge("3b")["steps"] | {"reached": 20, "kept": 10}


def test_a_continued_adapter_of_another_vocabulary() -> None:
    train_adapter("3a", 0.01, 1e-3, 1e-3)
    judge("3a")
    gate.check_ready(CHAIN["3b"], STAGES)
    base = Path("models/instruct")  # collected again, larger
    larger = base_tensors() | {"model.embed_tokens.weight": torch.zeros(60, 8)}
    write_weights(base, larger)
    (base / "config.json").write_text('{"vocab_size": 60}')
    (base / "source.json").write_text(json.dumps({"files": gate.described(base)}))
    with pytest.raises(BadInput, match=r"inputs of stage 3a changed since .*remove outputs/3a and train 3a again"):
        gate.check_ready(CHAIN["3b"], STAGES)


def test_tied_copies_need_the_key_that_keeps_them_one() -> None:
    Path("models/instruct/config.json").write_text('{"vocab_size": 50, "tie_word_embeddings": true}')
    gate.check_tying(CHAIN["3a"])
    CHAIN["3a"].config.pop("peft_ensure_weight_tying")
    try:
        with pytest.raises(BadInput, match="would drift apart: say `peft_ensure_weight_tying: true`"):
            gate.check_tying(CHAIN["3a"])
    finally:
        CHAIN["3a"].config["peft_ensure_weight_tying"] = True


# --- a verdict that was given before ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", '{"stage": "2a"}'])
def test_a_damaged_verdict(trained: None, text: str) -> None:
    CHAIN["2a"].verdict.write_text(text)
    with pytest.raises(BadInput, match=r"2a/trained\.json is damaged"):
        check("2c")


@pytest.mark.parametrize("name", ["2a", "2b", "2c"])
def test_a_verdict_does_not_hold_for_other_data_or_weights(trained: None, name: str) -> None:
    write_rows(name, "Il pleuvait.")
    with pytest.raises(BadInput, match=f"data of stage {name} changed"):
        check(name)
    write_rows(name)
    rewrite(name, lambda old: {key: tensor + 3e-3 for key, tensor in old.items()})
    with pytest.raises(BadInput, match=f"files of stage {name} changed"):
        check(name)


def test_what_a_stage_was_trained_on_is_still_there(trained: None) -> None:
    Path("data/2c.txt").write_text("Un autre livre.")
    with pytest.raises(
        BadInput, match=r"2c\.txt is not the file that data/2c\.manifest\.json describes; `make prep-c`"
    ):
        check("2c")
    train_2a(lambda tensor: tensor + 2e-3)
    judge("2a")
    with pytest.raises(BadInput, match="inputs of stage 2b changed"):
        check("2b")
    CHAIN["2a"].verdict.unlink()
    with pytest.raises(BadInput, match="has not passed its gate"):
        gate.check_inputs(CHAIN["2b"], STAGES)


# --- before a stage starts -------------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_rows_must_be_the_models() -> None:
    gate.check_tokenizer(CHAIN["2c"], STAGES)
    Path("models/base/config.json").write_text('{"vocab_size": 49}')
    with pytest.raises(BadInput, match="a token 49, but the model's vocabulary is 49"):
        gate.check_tokenizer(CHAIN["2c"], STAGES)
    Path("models/base/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    with pytest.raises(BadInput, match=r"another tokenizer .*`make prep-c`"):
        gate.check_tokenizer(CHAIN["2c"], STAGES)


def test_a_missing_compiler_is_said_before_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first step would fail otherwise, minutes later and a hundred lines long."""
    monkeypatch.delenv("CXX", raising=False)
    check_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match=r"no C\+\+ compiler \(g\+\+\)"):
        check_compiler()


LAUNCH = (
    "import train.stage as s; s.launch_and_wait(['sh', '-c', 'sleep 60 & echo $! > pids; echo $$ >> pids; sleep 60'])"
)


def test_all_that_a_launcher_started_ends_with_it(workdir: Path) -> None:
    """Killed, it can do nothing: the trainer, and what the trainer had started."""
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parent)}
    with subprocess.Popen([sys.executable, "-c", LAUNCH], env=environment, stderr=subprocess.DEVNULL) as launcher:
        pids: list[str] = []
        while len(pids) < 2:
            assert launcher.poll() is None
            time.sleep(0.05)
            pids = Path("pids").read_text().split() if Path("pids").exists() else []
        launcher.kill()
    deadline = time.time() + 10

    def state(pid: str) -> str:
        return subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()

    while any(state(pid)[:1] not in ("", "Z") for pid in pids):
        assert time.time() < deadline
        time.sleep(0.05)


LAYOUTS = {  # of the weights or the optimiser, in a checkpoint of several processes
    "DeepSpeed": "global_step20/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "FSDP": "optimizer_0/__1_0.distcp",
    "FSDP, sharded weights": "pytorch_model_fsdp_0/__1_0.distcp",
    "weights in several files": "model-00002-of-00002.safetensors",
}
FILES = ["trainer_state.json", "model.safetensors", "complete.json", *LAYOUTS.values()]


def write_layouts(checkpoint: Path) -> None:
    for name in LAYOUTS.values():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(bytes(64))
    seal(checkpoint)


@pytest.mark.parametrize("file", FILES)
def test_torn_checkpoints_are_found(file: str, plugin: None) -> None:
    """Cut, with a flipped byte, or gone, whatever the layout; set aside, and the one before serves."""
    assert launch("2a") == ""
    write_weights(Path("outputs/2a"), base_tensors())
    write_checkpoint("2a", 10, 20)
    write_checkpoint("2a", 15, 20)
    checkpoint = Path("outputs/2a/checkpoint-15")
    damaged = checkpoint / file
    write_layouts(checkpoint)
    assert is_whole(checkpoint)
    whole = damaged.read_bytes()
    for bytes_ in (whole[: len(whole) // 2], whole[:9] + bytes([whole[9] ^ 1]) + whole[10:]):
        damaged.write_bytes(bytes_)
        assert not is_whole(checkpoint)
    damaged.unlink()
    assert not is_whole(checkpoint)
    assert launch("2a") == ""
    assert [path.name for path in gate.checkpoints(Path("outputs/2a"))] == ["checkpoint-10"]
    assert (Path("outputs/2a/incomplete-checkpoint-15") / LAYOUTS["FSDP"]).exists() or file == LAYOUTS["FSDP"]


# --- the plugin, called as Axolotl calls it --------------------------------------------------------------------------


def registered(name: str, **overrides: Any) -> tuple[Any, Any]:
    """The plugin, and the settings it leaves, after Axolotl's first call."""
    from axolotl.utils.dict import DictDefault

    from train.plugins import Gate

    plugin = Gate()
    cfg = DictDefault(CHAIN[name].config | overrides | {"axolotl_config_path": str(CHAIN[name].recipe)})
    plugin.register(cfg)
    return plugin, cfg


def launch(name: str, **overrides: Any) -> str:
    """What `accelerate launch -m axolotl.cli.train recipes/NAME.yml` stops with before the rows are loaded; or empty."""
    plugin, cfg = registered(name, **overrides)
    try:
        plugin.load_datasets(cfg)
    except SystemExit as stop:
        return str(stop.code)
    return ""


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.plugins.end_with_parent", lambda: None)  # pytest is not a training
    monkeypatch.setattr("train.plugins.Gate.tokenise", lambda self, cfg: None)


def test_what_cannot_be_trained_is_refused(plugin: None) -> None:
    assert "gate: 2b: outputs/2a holds no checkpoint; `make stage-a`" in launch("2b")
    assert "does not know: learning_rat" in launch("2a", learning_rat=1)
    assert "does not know: tpye" in launch("2a", datasets=[{"path": "data/2a.jsonl", "tpye": "completion"}])
    assert "output_dir cannot be changed" in launch("2a", output_dir="elsewhere")
    Path("data/2a.jsonl").unlink()
    assert "2a.jsonl is missing" in launch("2a")


def test_a_disk_too_small_for_the_checkpoints_or_too_few_windows_are_refused(plugin: None) -> None:
    trainer = SimpleNamespace(
        model=torch.nn.Linear(10, 10),
        train_dataset=[{}] * 4,
        args=SimpleNamespace(world_size=4),
        get_eval_dataloader=None,
    )
    gate_plugin, cfg = registered("2a")
    gate_plugin.load_datasets(cfg)
    assert gate_plugin.add_callbacks_post_trainer(cfg, trainer)
    trainer.args.world_size = 5
    with pytest.raises(SystemExit, match="4 windows cannot be shared by 5 processes: take fewer"):
        gate_plugin.add_callbacks_post_trainer(cfg, trainer)
    trainer.args.world_size = 4
    trainer.model = torch.nn.Linear(10**8, 10**7, bias=False, device="meta", dtype=torch.bfloat16)
    with pytest.raises(SystemExit, match=r"GB free, 14000000\.00 GB are needed"):  # 3 x (2 bytes + 2 moments) + 2
        gate_plugin.add_callbacks_post_trainer(cfg, trainer)


def test_only_the_same_run_is_resumed(plugin: None) -> None:
    assert launch("2a", max_steps=40, plugins=["train.plugins.Gate"]) == ""  # without Liger, its keys stay
    assert launch("2a", max_steps=40) == ""
    write_weights(Path("outputs/2a"), base_tensors())
    write_checkpoint("2a", 20, 40)
    assert launch("2a", max_steps=40, use_wandb=True, save_total_limit=9) == ""
    assert "a run with other learning_rate, max_steps;" in launch("2a", max_steps=30, learning_rate=1)
    write_rows("2a", "Il pleuvait.")
    assert "a run with other data/2a.jsonl, data/2a.heldout.jsonl;" in launch("2a", max_steps=40)
    Path("outputs/2a/started.json").unlink()
    assert "nothing says which run" in launch("2a", max_steps=40)


def test_tokenised_rows_that_were_not_written_to_their_end_are_made_again(plugin: None) -> None:
    cache = Path(registered("2a")[1]["dataset_prepared_path"])
    for name in ("whole", "torn", "begun"):
        datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 100}).save_to_disk(cache / name)
    (cache / "begun/state.json").unlink()
    (arrow,) = (cache / "torn").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-1])
    (cache / "datasets_prep.lock").touch()
    left = ["datasets_prep.lock", "whole"]
    assert launch("2a") == "" and sorted(path.name for path in cache.iterdir()) == left
    rows, cfg = registered("2a")
    rows.pre_model_load(cfg)
    assert launch("2a") == "" and sorted(path.name for path in cache.iterdir()) == left
    (arrow,) = (cache / "whole").glob("*.arrow")
    flipped = bytearray(arrow.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    arrow.write_bytes(flipped)
    assert launch("2a") == "" and sorted(path.name for path in cache.iterdir()) == left[:1]


def test_a_run_killed_after_its_last_checkpoint_takes_its_weights(plugin: None, capsys: pytest.CaptureFixture) -> None:
    """Axolotl would train one step more than `max_steps`."""
    assert launch("2a", max_steps=20) == ""
    write_weights(Path("outputs/2a"), {name: nudge(tensor) for name, tensor in base_tensors().items()})
    write_checkpoint("2a")
    shards = Path("outputs/2a/checkpoint-20") / LAYOUTS["DeepSpeed"]
    shards.parent.mkdir()
    shards.touch()
    seal(shards.parent.parent)
    Path("outputs/2a/model.safetensors").unlink()
    assert launch("2a", max_steps=20) == "0" and "2a: trained, 20 of 20 steps" in capsys.readouterr().out
    assert check("2a")["steps"]["reached"] == 20
    assert not Path("outputs/2a/optimizer.pt").exists() and not Path("outputs/2a/global_step20").exists()


def test_a_trained_stage_is_not_trained_again(plugin: None, trained: None, capsys: pytest.CaptureFixture) -> None:
    assert launch("2c") == "0" and "Remove outputs/2c to train it again" in capsys.readouterr().out
    write_rows("2c", "Il pleuvait.")
    assert "data of stage 2c changed" in launch("2c")
    Path("outputs/2b").rename("outputs/other")  # an adapter that is missing is not looked for on the hub
    assert "outputs/2b holds no checkpoint" in launch("2c")


def test_two_trainings_in_one_folder(plugin: None, locked: Callable[..., Any]) -> None:
    with locked("outputs/2a") as other:
        assert f"process {other} is writing outputs/2a" in launch("2a")
    assert launch("2a") == ""


def test_new_rows_get_a_new_cache() -> None:
    paths = []
    for text in ("Il neigeait.", "Il pleuvait.", "Il neigeait."):
        write_rows("2a", text)
        paths.append(registered("2a")[1]["dataset_prepared_path"])
    assert paths[0] == paths[2] != paths[1] and all(path.startswith("data/prepared/2a-") for path in paths)


def test_rows_that_the_disk_cannot_hold_are_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.plugins.end_with_parent", lambda: None)
    monkeypatch.setattr("prep.common.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert "the disk of data/prepared/2a-" in launch("2a")


def test_a_recipe_that_names_no_cache_removes_none_of_the_users_folders(plugin: None) -> None:
    Path("mine").mkdir()
    assert launch("2a", dataset_prepared_path=None) == "" and Path("mine").exists() and Path("data").exists()


def test_rows_without_a_held_out_part() -> None:
    """What `--holdout 0` prepares for the last run, on the whole book."""
    Path("data/2c.heldout.jsonl").write_text("")
    cfg = registered("2c")[1]
    assert cfg["test_datasets"] is None and cfg["eval_steps"] is None
