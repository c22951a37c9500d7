"""Kill the preparation with -9 at random moments, run the same command again, and compare its bytes with an undisturbed run's.

    python bench/prep_kill.py --source FOLDER --tokenizer models/base      -> bench/reports/prep_kill.txt

The corpus is a dozen novels of FOLDER in eight files. Each time the whole process group is killed, workers and all, after a
part of the undisturbed run's time drawn evenly; the same command then goes on in the same folder. Status 1 if any byte of
rows, held-out rows or manifest differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.prep_speed import write_corpus
from prep.common import atomic_write

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "prep" / "gallica.py"


def prepared(folder: Path) -> dict[str, bytes]:
    """The files that a training reads."""
    return {path.name: path.read_bytes() for path in folder.glob("2a*")}


def trials(source: Path, tokenizer: Path, times: int, draw: random.Random, scratch: Path) -> Iterator[tuple[bool, str]]:
    """Whether the bytes were the same, and a line of the report, for the undisturbed run and for each kill."""

    def command(folder: Path) -> list[str]:
        given = {"source": source, "tokenizer": tokenizer, "out": folder / "2a.jsonl", "workers": 2}
        given |= {"sequence-len": 512, "windows": "all", "holdout": 0.1}
        return [sys.executable, str(SCRIPT), *(str(w) for k, v in given.items() for w in (f"--{k}", v))]

    began = time.monotonic()
    subprocess.run(command(scratch / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - began
    whole = prepared(scratch / "whole")
    yield True, f"undisturbed: {seconds:.1f} s, {sum(map(len, whole.values())):,} bytes in {len(whole)} files"
    for number in range(1, times + 1):
        folder = scratch / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        after = draw.uniform(0, seconds)
        with subprocess.Popen(
            command(folder), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(after)
                ended = "had ended"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                ended = "killed"
        marks = len(list(folder.glob("gallica/*/logs/*/completions/*")))
        again = subprocess.run(command(folder), capture_output=True, text=True)
        same = again.returncode == 0 and prepared(folder) == whole
        told = "the same bytes" if same else "DIFFERENT " + again.stderr[-500:]
        yield same, f"{number:3d}  {ended} after {after:5.1f} s, {marks:2d} tasks complete  then: {told}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a folder of French novels in parquet")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--books", type=int, default=12)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "reports" / "prep_kill.txt")
    args = parser.parse_args()
    lines = []
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        write_corpus(args.source, corpus, args.books)
        for same, line in trials(corpus, args.tokenizer, args.times, random.Random(args.seed), Path(scratch)):
            different += not same
            lines.append(line)
            print(line, flush=True)
    lines.append(f"{args.times - different} of {args.times} the same")
    print(lines[-1])
    with atomic_write(args.out) as handle:
        handle.write("\n".join(lines) + "\n")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
