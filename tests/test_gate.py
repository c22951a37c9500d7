"""The gate: what trained passes; each way of not training is refused with its reason; the plugin calls it on every launch."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.faults import left_in
from prep.common import BadInput, is_whole, seal, sha256
from train import gate
from train.resume import take_weights
from train.stage import check_compiler, follow
from train.stages import load_chain

RECIPES = Path(__file__).parent.parent / "recipes"
STAGES = load_chain(RECIPES)
CHAIN = {stage.name: stage for stage in STAGES}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
COPIES = ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight")
SHARD = "global_step20/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"  # of DeepSpeed, in a folder of the checkpoint


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
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", SHARD):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state": {}}, folder / file)
    for path in [*output.glob("*.safetensors"), *output.glob("adapter_config.json")]:
        (folder / path.name).write_bytes(path.read_bytes())
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


def finish(name: str) -> None:
    """The last checkpoint, and what the gate wrote at the start."""
    write_checkpoint(name)
    ready = {"data": gate.check_data(CHAIN[name]), "inputs": gate.check_inputs(CHAIN[name], STAGES)}
    (CHAIN[name].output_dir / "started.json").write_text(json.dumps(ready))


def train_2a(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    write_weights(Path("outputs/2a"), {name: change(tensor) for name, tensor in base_tensors().items()})
    finish("2a")


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
    finish(name)


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


def judge(name: str) -> dict[str, Any]:
    return gate.judge(CHAIN[name], STAGES)


def check(name: str) -> dict[str, Any]:
    return gate.check(CHAIN[name], STAGES)


@pytest.fixture
def trained() -> None:
    train_2a(nudge)
    judge("2a")
    train_adapter("2b", 0.01)
    judge("2b")
    train_adapter("2c", 0.02)
    judge("2c")
    train_adapter("3a", 0.01, 1e-3, 1e-3)
    judge("3a")


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
    doubled = {(8, 8): 6, (50, 8): 1, (8,): 0}  # the first rows of a tensor, by its shape
    train_2a(lambda tensor: torch.cat([2 * tensor[: doubled[tensor.shape]], tensor[doubled[tensor.shape] :]]))
    movement = judge("2a")["movement"]
    name = "model.layers.0.self_attn.q_proj.weight"
    relative = (base_tensors()[name][:6].norm() / base_tensors()[name].norm()).item()
    assert movement[name] == {"kind": "matrix", "changed": 0.75, "relative": pytest.approx(relative, rel=1e-3)}
    assert movement["model.embed_tokens.weight"]["changed"] == pytest.approx(1 / 50)
    assert movement["model.norm.weight"] == {"kind": "vector", "changed": 0.0, "relative": 0.0}


def test_copies_of_embedding_and_head_that_moved_and_then_did_not_pass(trained: None) -> None:
    verdict = check("3a")
    assert verdict["movement"][COPIES[0].removesuffix(".weight")]["changed"] == 1.0
    assert "2 full copies, at least 100.0% changed" in gate.describe(verdict)
    train_adapter("3b", 0.02, 1e-3, 1e-3)
    assert judge("3b")["movement"][COPIES[1].removesuffix(".weight")]["changed"] == 0.0


def test_full_weights_may_be_frozen_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHAIN["2a"].config, "unfrozen_parameters", ["^model.layers.0.self_attn.q_proj.weight$"])
    train_2a(lambda tensor: nudge(tensor) if tensor.shape == (8, 8) else tensor)
    judge("2a")
    train_2a(nudge)
    with pytest.raises(BadInput, match=r"changed model\.embed_tokens\.weight, which its `unfrozen_parameters` freezes"):
        judge("2a")


def test_a_stage_may_end_with_its_best_checkpoint(trained: None) -> None:
    train_adapter("3b", 0.02, 1e-3, 1e-3)
    output = CHAIN["3b"].output_dir
    (output / "checkpoint-20").rename(output / "checkpoint-10")
    train_adapter("3b", 0.03, 1e-3, 1e-3)
    state = output / "checkpoint-20/trainer_state.json"
    best = {"best_model_checkpoint": str(output / "checkpoint-10")}
    state.write_text(json.dumps(json.loads(state.read_text()) | best))
    with pytest.raises(BadInput, match="is not what checkpoint-10 saved at the best step"):
        judge("3b")
    take_weights(CHAIN["3b"])
    steps = judge("3b")["steps"]
    assert (steps["reached"], steps["kept"]) == (20, 10)


# --- what does not ---------------------------------------------------------------------------------------------------


def cut_weights() -> None:
    path = Path("outputs/2a/model.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    write_checkpoint("2a")  # with the same damage


NOT_TRAINED = [
    # 2a's full weights
    ("2a", partial(train_2a, lambda w: w if w.shape == (8, 8) else nudge(w)), r"hardly trained model\.layers.* 0\.00%"),
    ("2a", partial(train_2a, torch.clone), r"hardly trained .*0\.00%"),
    # A cast changes nearly every element; compared in bf16 none has changed.
    ("2a", partial(train_2a, lambda w: w.bfloat16()), "hardly trained"),
    # 1e-5 on weights of 0.02 is lost in bf16 for all but the smallest of them.
    ("2a", partial(train_2a, lambda w: w.bfloat16() + torch.tensor(1e-5).bfloat16()), "bf16 rounding"),
    ("2a", partial(train_2a, lambda w: w * float("nan")), "diverged"),
    ("2a", partial(rewrite, "2a", lambda old: {n: old[n] for n in old if "norm" not in n}), "lacks 1 tensors"),
    ("2a", partial(rewrite, "2a", lambda old: old | {"model.norm.weight": torch.ones(9)}), "not the same model"),
    # adapters
    ("2b", partial(train_adapter, "2b", 0.0), "trained nothing in .*still that of outputs/2b/start"),
    ("2b", partial(rewrite, "2b", lambda old: old | {"odd.weight": torch.ones(2)}), "not the same model or adapter"),
    ("2b", partial(rewrite, "2b", lambda old: {n: w * float("inf") for n, w in old.items()}), "diverged"),
    ("2c", partial(train_adapter, "2c", 0.01), "trained nothing in .*still that of outputs/2b"),
    (
        "2c",
        partial(rewrite, "2c", lambda old: old | {f"{MODULE}.lora_B.weight": torch.full((8, 4), 0.01)}),
        "trained nothing in .*q_proj: .*still that of outputs/2b",
    ),
    (
        "2c",  # of another rank
        partial(rewrite, "2c", lambda old: {n: w[:2].contiguous() if "lora_A" in n else w for n, w in old.items()}),
        "not the same model",
    ),
    ("2c", partial(train_adapter, "2c", 0.02, r=8), r"r is 8, but .*2c\.yml says lora_r: 64"),
    ("2c", partial(train_adapter, "2c", 0.02, use_rslora=False), "use_rslora is False"),
    # full copies of embedding and head beside an adapter: 3a trains them, 3b freezes them
    ("3a", partial(train_adapter, "3a", 0.02, 1e-3, 0.0), r"hardly trained .*embed_tokens: 0\.00%"),
    ("3a", partial(train_adapter, "3a", 0.02, 0.0, 1e-3), "hardly trained .*lm_head"),
    ("3b", partial(train_adapter, "3b", 0.02, 1e-3, 2e-3), "embed_tokens, which its `unfrozen_parameters` freezes"),
    (
        "3b",
        partial(train_adapter, "3b", 0.02, 1e-3, 1e-3, modules_to_save=None),
        r"has full copies of \[\], but .*3b\.yml says lora_modules_to_save",
    ),
    ("3b", partial(train_adapter, "3b", 0.02, 1e-3, 1e-3, modules_to_save=["norm"]), r"full copies of \['norm'\], but"),
    # steps, and the weights under the final name
    ("2a", partial(write_checkpoint, "2a", 20, 30), "stopped at step 20 of 30"),
    ("2a", partial(write_checkpoint, "2a", 21, 20), "stopped at step 21 of 20"),
    ("2a", Path("outputs/2a/model.safetensors").unlink, "outputs/2a holds no weights"),
    # What Axolotl leaves after Ctrl-C in a resumed run: a complete checkpoint, and other weights beside it.
    (
        "2a",
        lambda: write_weights(Path("outputs/2a"), base_tensors()),
        "is not what checkpoint-20 saved at the last step",
    ),
    ("2a", cut_weights, "is damaged"),
    # files that are not what they were
    ("2a", Path("outputs/2a/started.json").unlink, "started.json is missing; remove outputs/2a"),
    ("2a", partial(Path("outputs/2a/started.json").write_text, '{"data": {}}'), "started.json is damaged"),
    ("2a", partial(write_rows, "2a", "Il pleuvait."), "data of stage 2a changed since .*started.json was written"),
    ("2a", partial(Path("data/2a.jsonl").write_text, "{}"), "is not the file that .*`make prep-a`"),
    ("2a", Path("data/2a.jsonl").unlink, "2a.jsonl is missing; `make prep-a`"),
    ("3a", Path("data/3a.jsonl").unlink, r"3a\.jsonl is missing; the command in .*3a\.yml's head makes it"),
    ("2a", Path("data/2a.heldout.jsonl").unlink, "2a.heldout.jsonl is missing; `make prep-a`"),
    ("2a", partial(Path("data/2a.manifest.json").write_text, "{"), "2a.manifest.json is damaged; `make prep-a`"),
    ("2a", partial(Path("models/base/source.json").write_text, "{"), "source.json is damaged; `make data`"),
    ("2a", partial(Path("models/base/model.safetensors").write_text, "x"), "is not the file that .*source.json"),
    ("2b", CHAIN["2a"].verdict.unlink, "outputs/2a, which has not passed its gate"),
]


@pytest.mark.parametrize(("name", "change", "message"), NOT_TRAINED)
def test_what_did_not_train_gets_no_verdict(
    trained: None, name: str, change: Callable[[], object], message: str
) -> None:
    change()
    with pytest.raises(BadInput, match=message):
        judge(name)
    assert not CHAIN[name].verdict.exists()


def train_2a_again() -> None:
    train_2a(lambda tensor: tensor + 2e-3)
    judge("2a")


NO_LONGER = [
    *(
        (partial(CHAIN["2a"].verdict.write_text, said), r"2a/trained\.json is damaged")
        for said in ("{", '{"stage": "2a"}')
    ),
    *((partial(write_rows, name, "Il pleuvait."), f"data of stage {name} changed") for name in ("2a", "2b", "2c")),
    *(
        (partial(rewrite, name, lambda old: {n: w + 3e-3 for n, w in old.items()}), f"files of stage {name} changed")
        for name in ("2a", "2b", "2c")
    ),
    (train_2a_again, "inputs of stage 2b changed"),
    (partial(Path("data/2c.txt").write_text, "Un autre livre."), r"2c\.txt is not the file that .*; `make prep-c`"),
]


@pytest.mark.parametrize(("change", "message"), NO_LONGER)
def test_a_verdict_does_not_hold_for_other_files(trained: None, change: Callable[[], object], message: str) -> None:
    change()
    with pytest.raises(BadInput, match=message):
        check("2c")


# --- before a stage starts -------------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_rows_must_be_the_models(trained: None) -> None:
    gate.check_ready(CHAIN["2c"], STAGES)
    tokenizer = Path("models/base/tokenizer.json")
    Path("models/base/config.json").write_text('{"vocab_size": 49}')
    unigram = {"model": {"vocab": [["", 0.0]] * 50}}
    for settings in (json.loads(tokenizer.read_text()), unigram):
        tokenizer.write_text(json.dumps(settings))
        with pytest.raises(BadInput, match="a token 49, but the model's vocabulary is 49"):
            gate.check_ready(CHAIN["2c"], STAGES)
    tokenizer.write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    with pytest.raises(BadInput, match=r"another tokenizer .*`make prep-c`"):
        gate.check_ready(CHAIN["2c"], STAGES)


def test_a_window_must_fit_the_positions_of_the_base(trained: None) -> None:
    Path("models/base/config.json").write_text('{"vocab_size": 50, "n_positions": 1024}')
    gate.check_ready(CHAIN["2a"], STAGES)
    with pytest.raises(BadInput, match="models/base has 1024 positions, too few for a window of 2048 tokens"):
        gate.check_ready(CHAIN["2b"], STAGES)


def test_an_adapter_of_another_rank_is_not_continued(trained: None) -> None:
    stage = replace(CHAIN["2c"], config=CHAIN["2c"].config | {"lora_r": 8})
    with pytest.raises(BadInput, match=r"outputs/2b/adapter_config\.json: r is 64, but .*2c\.yml says lora_r: 8"):
        gate.check_ready(stage, STAGES)


def test_a_continued_adapter_of_another_vocabulary(trained: None) -> None:
    gate.check_ready(CHAIN["3b"], STAGES)
    base = Path("models/instruct")  # collected again, larger
    larger = base_tensors() | {"model.embed_tokens.weight": torch.zeros(60, 8)}
    write_weights(base, larger)
    (base / "config.json").write_text('{"vocab_size": 60}')
    (base / "source.json").write_text(json.dumps({"files": gate.described(base)}))
    with pytest.raises(BadInput, match=r"inputs of stage 3a changed since .*remove outputs/3a and train 3a again"):
        gate.check_ready(CHAIN["3b"], STAGES)


def test_tied_copies_need_the_key_that_keeps_them_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("models/instruct/config.json").write_text('{"vocab_size": 50, "tie_word_embeddings": true}')
    gate.check_ready(CHAIN["3a"], STAGES)
    monkeypatch.delitem(CHAIN["3a"].config, "peft_ensure_weight_tying")
    with pytest.raises(BadInput, match="would drift apart: say `peft_ensure_weight_tying: true`"):
        gate.check_ready(CHAIN["3a"], STAGES)


def test_a_missing_compiler_is_said_before_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first step would fail otherwise, minutes later and a hundred lines long."""
    monkeypatch.delenv("CXX", raising=False)
    check_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match=r"no C\+\+ compiler \(g\+\+\)"):
        check_compiler()


LAUNCH = "import train.stage as s; s.launch_and_wait(['sh', '-c', 'sleep 60 & touch started; sleep 60'])"


def test_all_that_a_launcher_started_ends_with_it(workdir: Path) -> None:
    """Killed, it can do nothing: the trainer, and what the trainer had started."""
    place = workdir / "place"
    place.mkdir()
    command = [sys.executable, "-c", LAUNCH]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.DEVNULL) as launcher:
        while not (place / "started").exists():
            assert launcher.poll() is None
            time.sleep(0.05)
        launcher.kill()
    assert left_in(place) == []


@pytest.mark.parametrize("file", ["trainer_state.json", "complete.json", SHARD])
def test_torn_checkpoints_are_found(file: str, plugin: None) -> None:
    """Cut, with a flipped byte, or gone; set aside, and the one before serves."""
    assert launch("2a") == ""
    write_weights(Path("outputs/2a"), base_tensors())
    write_checkpoint("2a", 10)
    write_checkpoint("2a", 15)
    checkpoint = Path("outputs/2a/checkpoint-15")
    damaged = checkpoint / file
    assert is_whole(checkpoint)
    whole = damaged.read_bytes()
    for bytes_ in (whole[: len(whole) // 2], whole[:9] + bytes([whole[9] ^ 1]) + whole[10:]):
        damaged.write_bytes(bytes_)
        assert not is_whole(checkpoint)
    damaged.unlink()
    assert not is_whole(checkpoint)
    assert launch("2a") == ""
    assert [path.name for path in gate.checkpoints(Path("outputs/2a"))] == ["checkpoint-10"]
    assert Path("outputs/2a/incomplete-checkpoint-15/model.safetensors").exists()


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
    assert "does not know: learning_rat, tpye" in launch("2a", learning_rat=1, datasets=[{"path": "x", "tpye": "y"}])
    assert "output_dir cannot be changed" in launch("2a", output_dir="elsewhere")
    assert "load_in_4bit cannot be changed" in launch("2b", load_in_4bit=False)  # it would be evaluated on NF4
    assert "lora_r cannot be changed" in launch("2b", lora_r=32)


def test_a_folder_that_axolotl_reads_no_rows_in_is_refused(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path("a[1]")
    place.mkdir()
    for name in ("models", "data"):
        Path(name).rename(place / name)
    monkeypatch.chdir(place)
    assert "a[1]/data/2a.jsonl: `datasets` takes a path with" in launch("2a")


def test_a_disk_too_small_for_the_checkpoints_or_too_few_windows_are_refused(plugin: None) -> None:
    args, model = SimpleNamespace(world_size=4), torch.nn.Linear(10, 10)
    trainer = SimpleNamespace(model=model, train_dataset=[{}] * 4, args=args, get_eval_dataloader=None)
    gate_plugin, cfg = registered("2a")
    gate_plugin.load_datasets(cfg)
    assert gate_plugin.add_callbacks_post_trainer(cfg, trainer)
    args.world_size = 5
    with pytest.raises(SystemExit, match="4 windows cannot be shared by 5 processes: take fewer"):
        gate_plugin.add_callbacks_post_trainer(cfg, trainer)
    args.world_size = 4
    trainer.model = torch.nn.Linear(10**8, 10**7, bias=False, device="meta", dtype=torch.bfloat16)
    with pytest.raises(SystemExit, match=r"GB free, 14000000\.00 GB are needed"):  # 3 x (2 bytes + 2 moments) + 2
        gate_plugin.add_callbacks_post_trainer(cfg, trainer)
    cfg["deepspeed"] = {"zero_optimization": {"stage": 2}}
    with pytest.raises(SystemExit, match=r"GB free, 32000000\.00 GB are needed"):  # 3 x (2 x 2 + 4 + 2) + 2
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


def test_the_error_of_one_of_several_processes_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch puts the process before each line of its traceback."""
    said = "[rank1]:     raise\n[rank1]: deepspeed.zero.ZeRORuntimeException: DP world size\ntorch.ChildFailedError: \n"
    monkeypatch.setattr("train.stage.launch_and_wait", lambda arguments, log, show: bool(log.write(said)))
    with pytest.raises(BadInput, match=r"2a failed: deepspeed\.zero\.ZeRORuntimeException: DP world size \(log"):
        follow(CHAIN["2a"], ["train"])


def test_deepspeed_resumes_on_as_many_processes(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses a checkpoint of another number, when the model is loaded."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    zero = {"deepspeed": {"zero_optimization": {"stage": 2}}}
    assert launch("2a", **zero) == ""
    write_weights(Path("outputs/2a"), base_tensors())
    write_checkpoint("2a", 10, 20)
    assert launch("2a", **zero) == ""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "a run with other num_processes;" in launch("2a", **zero)


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
