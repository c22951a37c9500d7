#!/usr/bin/env bash
# Resolve base.in and gpu.in into hash-locked files. Run through `make lock`, which brings uv.
#
# One lock serves the CPU and the CUDA build of the same torch: base.txt holds what both need, with the hashes of both
# builds of torch; cuda-constraints.txt holds the packages that only the CUDA build pulls. As constraints they install
# nothing by themselves, but pip accepts their hashes when torch asks for them.
set -euo pipefail
cd "$(dirname "$0")"

# The CPU build, torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, is not in the registry that uv reads.
torch_cpu=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b

compile() { uv pip compile "$@" --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links; }

all=$(mktemp) && trap 'rm -f "$all" "$all.gpu"' EXIT
compile base.in --output-file "$all" >/dev/null
python - "$all" "$torch_cpu" <<'PY'
import re
import sys

text, torch_cpu = open(sys.argv[1]).read(), sys.argv[2]
blocks = re.findall(r"^\S.*(?:\n    .*)*", text, re.M)
# nvidia-ml-py is Axolotl's own dependency; every other one of these comes with torch's CUDA build alone.
cuda = [block for block in blocks if re.match(r"(nvidia-(?!ml-py)|cuda-)", block)]
base = [block for block in blocks if block not in cuda]
base = [block + f" \\\n    --hash=sha256:{torch_cpu}" if block.startswith("torch==") else block for block in base]
note = "# Made by requirements/lock.sh; do not edit.\n"
open("base.txt", "w").write(note + "\n".join(base) + "\n")
open("cuda-constraints.txt", "w").write(note + "\n".join(cuda) + "\n")
PY

compile gpu.in --constraints "$all" --output-file "$all.gpu" >/dev/null
python - "$all" "$all.gpu" <<'PY'
import re
import sys

base, gpu = ({block.split("==")[0]: block for block in re.findall(r"^\S.*(?:\n    .*)*", open(path).read(), re.M)} for path in sys.argv[1:])
# Installed with --no-deps on top of base.txt: only what that does not hold.
new = [block for name, block in gpu.items() if name not in base]
open("gpu.txt", "w").write("# Made by requirements/lock.sh; do not edit.\n" + "\n".join(new) + "\n")
PY
