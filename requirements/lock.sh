#!/usr/bin/env bash
# Resolve base.in and gpu.in into hash-locked files. Run through `make lock`, which brings uv.
#
# One lock serves the CPU and the CUDA build of the same torch: base.txt holds what both need, cuda.txt what only the CUDA
# build pulls, torch-cpu.txt the CPU build itself. All are complete, so pip installs them with --no-deps: it has nothing to
# resolve, and nothing that is not listed can come in. (The other way, cuda.txt as constraints of one resolving install,
# fails: pip does not take a constraint's hash for a requirement with extras, as torch's cuda-toolkit[cublas,...] is.)
set -euo pipefail
cd "$(dirname "$0")"

compile() { uv pip compile "$@" --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --strip-extras --no-emit-index-url --no-emit-find-links; }

all=$(mktemp) && trap 'rm -f "$all" "$all.gpu"' EXIT
compile base.in --output-file "$all" >/dev/null
python - "$all" <<'PY'
import re
import sys

blocks = re.findall(r"^\S.*(?:\n    .*)*", open(sys.argv[1]).read(), re.M)
# nvidia-ml-py is Axolotl's own dependency; every other one of these comes with torch's CUDA build alone.
cuda = [block for block in blocks if re.match(r"(nvidia-(?!ml-py)|cuda-)", block)]
base = [block for block in blocks if block not in cuda]
note = "# Made by requirements/lock.sh; do not edit.\n"
open("base.txt", "w").write(note + "\n".join(base) + "\n")
open("cuda.txt", "w").write(note + "\n".join(cuda) + "\n")
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

compile converter.in --no-deps --output-file converter.txt >/dev/null
sed -i '1i # Made by requirements/lock.sh; do not edit.' converter.txt

compile nvcc.in --constraints "$all" --output-file nvcc.txt >/dev/null
sed -i '1i # Made by requirements/lock.sh; do not edit.' nvcc.txt
