"""What comes of a command that is killed, of files that are damaged and of a full disk, once the same command is given again.

    python bench/faults.py                      # make bench-faults; hours on two cores; run it again to continue
    python bench/faults.py --only 'train 2b'    # the cases whose name holds these words; --list names them all

Gives the commands of faults.yml once, undisturbed, on a Llama of a few thousand weights and the demo's texts. Each case begins
with a copy of what was there before or after a command, does something to it, gives the command again and compares what it
makes with the undisturbed files. A case draws its moments, files and places by its name, so it can be repeated; those that
ended in a fault are. What ended before it was disturbed does not count. When the code has changed, remove --work's folder.
Writes bench/reports/faults.json, and faults.md from it. A full disk needs root, for a small tmpfs.
"""

from prep.command import run

import argparse
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench.common import resumed, write_report
from eval.tables import markdown
from prep.common import ROOT, BadInput, commit, cpu_name, git_state, progress, read_yaml, sha256, versions

PLAN = read_yaml(Path(__file__).with_suffix(".yml"))
COMMANDS = PLAN["commands"]
BYTES, FIGURES, REFUSAL, FAULT = OUTCOMES = ("same bytes", "same figures", "one clear refusal", "FAULT")
ENDED = " (it had ended)"
WORDS = {"cut": "a file cut", "flip": "a bit flipped", "gone": "a file removed", "full": "the disk full"}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def cases() -> dict[str, tuple[str, list[str], list[str]]]:
    """{name: the command, what puts it into its state, the deeds}."""
    found = {}
    for row in PLAN["cases"]:
        for name, deed, number in itertools.product(row["to"], row["do"], range(1, row.get("times", 1) + 1)):
            stage, state = name.split()[-1], row.get("state", "whole")
            setup = [each.format(stage=stage) for each in PLAN["states"][state]]
            case = f"{name}, {state}: {deed.format(stage=stage)} #{number}"
            found[case] = (name, setup, deed.format(stage=stage).split(", "))
    return found


def start_from(state: Path, place: Path) -> None:
    """Put a copy of `state` in the place of what was there."""
    for folder in filter(Path.is_mount, place.glob("*")):
        subprocess.run(["umount", folder], check=True)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(state, place)


def hear_signals() -> None:
    """What `nohup` and a shell's & make a command ignore, and all that it starts."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def give(name: str, place: Path, disturb: Callable[[Any], object] = lambda process: None) -> tuple[int, str]:
    """Run a command in `place`: its exit status, and what it printed."""
    script, *arguments = [part.format(root=ROOT) for part in shlex.split(COMMANDS[name][0])]
    command = [sys.executable, str(ROOT / script), *arguments]
    alone: dict[str, Any] = {"cwd": place, "env": ENVIRONMENT, "start_new_session": True, "preexec_fn": hear_signals}
    with (place.parent / "printed").open("w+b") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, **alone)
        try:
            disturb(process)
            process.wait(1800)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return process.returncode, said.read().decode(errors="replace")


def left_in(place: Path) -> list[int]:
    """Processes that still work in a folder after ten seconds in which they may end."""
    for _ in range(100):
        running = psutil.process_iter(["cwd"])
        found = [each.pid for each in running if Path(each.info["cwd"] or "").is_relative_to(place)]
        if not found:
            break
        time.sleep(0.1)
    return found


def figures(path: Path) -> Any:
    """What a JSON file says, but for times and changes to the tree (a report is one); of others and damaged ones the sha256."""

    def timeless(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in ("date", "seconds", "training", "modified")}

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=timeless)
    except ValueError:
        return sha256(path)


def made(name: str, place: Path, look: Callable[[Path], Any]) -> dict[str, Any]:
    """{file: what `look` sees in it} of what a command makes."""
    files = [path for pattern in COMMANDS[name][1].split() for path in sorted(place.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(place)): look(path) for path in files if path.suffix != ".lock"}


def undisturbed(work: Path, last: int) -> dict[str, tuple[Path, Path, float]]:
    """{command: the folder before it, the one after it, its seconds} of the first commands; each is given once."""
    place, before = work / "place", work / "before"
    if not before.exists():
        sys.path.append(str(ROOT / "tests"))  # their tiny Llama
        from tiny_curriculum import save_base, save_chat_base

        save_base(place / "tiny")
        save_chat_base(place / "chat")
        corpus: list[str | Path] = [sys.executable, ROOT / "demo/corpus.py", "--out", place / "sources"]
        subprocess.run(corpus, env=ENVIRONMENT, check=True)
        place.rename(before)
    found = {}
    for name in progress(list(COMMANDS)[: last + 1], unit="command", desc="undisturbed"):
        after, took = work / f"after {name}", work / f"seconds {name}"
        if not after.exists():
            start_from(before, place)
            started = time.perf_counter()
            status, said = give(name, place)
            if status:
                raise BadInput(f"{name} fails undisturbed: {said[-500:]}")
            took.write_text(str(time.perf_counter() - started))
            place.rename(after)
        found[name] = (before, after, float(took.read_text()))
        before = after
    return found


def damage(place: Path, how: str, pattern: str, draw: random.Random) -> str:
    """Cut, flip or remove one file; what was done to what."""
    found = [path for path in sorted(place.glob(pattern)) if how == "gone" or (path.is_file() and path.stat().st_size)]
    path = draw.choice(found)
    where = path.relative_to(place)
    if how == "gone":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return f"removed {where}"
    whole = bytearray(path.read_bytes())
    at = draw.randrange(len(whole))
    if how == "flip":
        whole[at] ^= 1 << draw.randrange(8)
    path.write_bytes(whole if how == "flip" else whole[:at])
    return f"{'flipped a bit of' if how == 'flip' else 'cut'} {where} at byte {at:,} of {len(whole):,}"


def kill(name: str, place: Path, signal_: str, moment: float) -> tuple[str, str | None]:
    """Give a command and kill it; when, and what was wrong with its end."""
    number = getattr(signal, f"SIG{signal_}")

    def stop(process: Any) -> None:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            # A terminal tells every process; `kill` and the kernel for want of memory tell one.
            os.killpg(process.pid, number) if signal_ in ("HUP", "INT") else process.send_signal(number)

    status, said = give(name, place, stop)
    wrong = trouble(said, 1, "") or ("processes were left running" if left_in(place) else None)
    return f"SIG{signal_} after {moment:.1f} s" + ("" if status else ENDED), wrong


def fill(name: str, place: Path, after: Path, target: str, share: float) -> tuple[str, str | None]:
    """Give a command with room for a share of what it adds to a folder, then make room; what was done, what was wrong."""

    def pages(folder: Path) -> int:
        return 4096 + sum(4096 + -(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))

    folder, aside = place / target, place.with_name("aside")
    folder.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    folder.mkdir()
    room = pages(aside) + round(share * (pages(after / target) - pages(aside)))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], check=True)
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    status, said = give(name, place)
    subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
    last = f": {said.strip().splitlines()[-1]}" if status else ENDED
    return f"{share:.0%} of the room in {target}/{last}", trouble(said, status, name) if status else None


def trouble(said: str, status: int, name: str) -> str | None:
    """What is wrong with how a command ended: a traceback, or, where it should, no line of its own."""
    lines = said.strip().splitlines() or [""]
    if "Traceback (most recent call last)" in said:
        return f"traceback: {lines[-1]}"
    script = Path(COMMANDS[name][0].split()[0]).name if name else ""
    own = not name or any(line.startswith(f"{script}: ") for line in lines[-3:])
    return None if own else f"{status}: {lines[-1]}"


def try_case(
    name: str, setup: list[str], deeds: list[str], states: tuple[Path, Path, float], work: Path, draw: random.Random
) -> dict[str, Any]:
    """Do it, give the same command again, and compare: {"done", "outcome", "said"}."""
    before, after, seconds = states
    place, done, wrongs = work / "place", [], []
    start_from(before if deeds[0].startswith(("kill", "full")) else after, place)
    for how, pattern in map(str.split, setup):
        damage(place, how, pattern, draw)
    for how, target in map(str.split, deeds):
        wrong = None
        if how == "kill":  # a resumed command takes less time
            started = time.perf_counter()
            what, wrong = kill(name, place, target, draw.uniform(0, seconds * (0.7 if len(deeds) > 1 else 1)))
            if what.endswith(ENDED):  # the machine has less to do than when it was timed
                seconds = time.perf_counter() - started
                start_from(before, place)
        elif how == "full":
            what, wrong = fill(name, place, after, target, draw.uniform(0.05, 0.9))
        else:
            what = damage(place, how, target, draw)
        done.append(what)
        wrongs += [wrong] if wrong else []
    status, said = give(name, place)
    last = (said.strip().splitlines() or [""])[-1]
    if status:
        outcome = REFUSAL
        wrongs += [wrong] if (wrong := trouble(said, status, name)) else []
    else:
        expected, found = (made(name, folder, figures) for folder in (after, place))
        outcome = BYTES if made(name, after, sha256) == made(name, place, sha256) else FIGURES
        wrongs += [f"{file} is another" for file in {**expected, **found} if expected.get(file) != found.get(file)]
    said = "; ".join(wrongs) or (last if status else "")
    return {"done": done, "outcome": FAULT if wrongs else outcome, "said": said.replace(str(work), "")}


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    plan = cases()
    results = {name: report["cases"][name] for name in plan if name in report["cases"]}
    deeds = [
        (name, *deed.split())
        for name, result in results.items()
        for deed, what in zip(plan[name][2], result["done"], strict=True)
        if not what.endswith(ENDED)
    ]

    def table(head: str, groups: list[str]) -> str:
        ends = [(group, results[name]["outcome"]) for group, (name, *_) in zip(groups, deeds, strict=True)]
        counts = Counter([*ends, *(("all", outcome) for _, outcome in ends)])
        rows = []
        for group in dict.fromkeys([*groups, "all"]):
            numbers = [counts[group, outcome] for outcome in OUTCOMES]
            rows.append([group, *map(str, (sum(numbers), *numbers))])
        return markdown(([head, "times", *OUTCOMES], rows))

    def listed(outcome: str) -> list[str]:
        chosen = {name: result for name, result in results.items() if result["outcome"] == outcome}
        lines = [f"- **{plan[name][0]}**: {'; '.join(r['done'])}: `{r['said']}`" for name, r in chosen.items()]
        return lines or ["None."]

    return "\n".join([
        "# Killed, damaged, out of disk: what comes of the same command\n",
        f"{len(deeds)} kills and damages in {len(results)} of {len(plan)} cases of `make bench-faults` "
        "([`faults.yml`](../faults.yml)). Each case has to end in the bytes, or the figures, of an undisturbed run, or in one line "
        "that says what is wrong; a kill or damage counts under what came of its case.\n",
        table("what was done", [f"SIG{target}" if how == "kill" else WORDS[how] for _, how, target in deeds]), "",
        table("to which command", [plan[name][0] for name, *_ in deeds]), "",
        "## Faults\n", *listed(FAULT), "\n## Refusals\n", *listed(REFUSAL), "",
        f"{', '.join(f'{k} {v}' for k, v in report['versions'].items())}; "
        f"{'; '.join(sorted({result['cpu'] + ', ' + result['commit'] for result in results.values()}))}.\n",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--only", default="", help="cases whose name holds these words")
    option("--list", action="store_true", help="the cases, and what came of them")
    option("--work", type=Path, default=ROOT / "bench/run/faults", help="folder (default: %(default)s)")
    option("--out", type=Path, default=ROOT / "bench/reports/faults.json", help="the report (default: %(default)s)")
    args = parser.parse_args()
    facts = {"versions": versions("torch", "transformers", "axolotl", "datatrove")}
    report = resumed(args.out, {**facts, "cases": {}}, {} if args.list else facts)
    results, work = report["cases"], args.work.resolve()
    chosen = {name: case for name, case in cases().items() if args.only in name}
    if args.list:
        print("\n".join(f"{results.get(name, {}).get('outcome', 'not yet'):18} {name}" for name in chosen))
        return
    if not chosen:
        raise BadInput(f"no case holds {args.only!r}: --list names them")
    full = [case for case, (_, _, deeds) in chosen.items() if any(deed.startswith("full") for deed in deeds)]
    if full and os.geteuid() != 0:
        raise BadInput(f"only root can mount the small disk that `{full[0]}` fills: choose others with --only")
    work.mkdir(parents=True, exist_ok=True)
    states = undisturbed(work, max(list(COMMANDS).index(name) for name, *_ in chosen.values()))
    waiting = [name for name in chosen if results.get(name, {}).get("outcome", FAULT) == FAULT]
    machine = {"commit": commit(git_state()), "cpu": cpu_name()}
    for case in progress(waiting, unit="case"):
        name, setup, deeds = chosen[case]
        results[case] = try_case(name, setup, deeds, states[name], work, random.Random(case)) | machine
        write_report(args.out, report, page(report))


if __name__ == "__main__":
    run(main)
