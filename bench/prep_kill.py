"""Kill the preparation with -9 at random moments, run the same command again, and compare its bytes with an undisturbed run's.

    python bench/prep_kill.py --source data/raw/gallica --tokenizer models/base --times 20

Each time the whole process group is killed, workers and all, after a part of the undisturbed run's time drawn evenly; the
same command then goes on in the same folder. Status 1 if any byte of rows, held-out rows or manifest differs.
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
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "prep" / "gallica.py"


def prepared(folder: Path) -> dict[str, bytes]:
    """The files that a training reads."""
    return {path.name: path.read_bytes() for path in folder.glob("2a*")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    different = 0
    with tempfile.TemporaryDirectory() as scratch:

        def command(folder: Path) -> list[str]:
            given = {"source": args.source, "tokenizer": args.tokenizer, "out": folder / "2a.jsonl", "workers": 2}
            given |= {"sequence-len": 512, "windows": "all", "holdout": 0.1}
            return [sys.executable, str(SCRIPT), *(str(w) for k, v in given.items() for w in (f"--{k}", v))]

        began = time.monotonic()
        subprocess.run(command(Path(scratch) / "whole"), check=True, capture_output=True)
        seconds = time.monotonic() - began
        whole = prepared(Path(scratch) / "whole")
        print(
            f"undisturbed: {seconds:.1f} s, {sum(map(len, whole.values())):,} bytes in {len(whole)} files", flush=True
        )
        for number in range(1, args.times + 1):
            folder = Path(scratch) / "killed"
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
            different += not same
            print(
                f"{number:3d}  {ended} after {after:5.1f} s, {marks:2d} tasks complete  then: "
                f"{'the same bytes' if same else 'DIFFERENT ' + again.stderr[-500:]}",
                flush=True,
            )
    print(f"{args.times - different} of {args.times} the same")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
