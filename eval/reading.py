"""Blind reading: which of two passages is the author's? And of two stages, which would you go on reading?

Draws pairs of passages after the same lines of the novel's held-out block and adds them to a report. Its pages are then one
more, <run>.reading.html: a file that needs no network, to send to readers or to read in the workbench. Of five pairs three are
author and stage, one is stage and stage, and one is a control, whose sides differ in nothing that should be told: the author's
continuation beside another held-out passage of his, or two draws of one stage.

A reader's answers go into a file of their own, <run>.answers.<reader>.jsonl beside the report: the workbench appends them, the
page offers them for download. eval/evaluation.py (make eval) merges these files into the report's section Blind reading.

    python eval/reading.py --run full                                      # make reading
    cd demo/run && python ../../eval/reading.py --recipes ../../recipes --run demo --out ../../eval/reports --pairs 20 --words 40
"""

from prep.command import run

import argparse
import glob
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import binomtest

from eval import metrics, report
from eval.tasks.texts import read_rows
from prep.common import BadInput, changed, digest, lock, positive, run_name, write_json
from prep.typography import to_convention

AUTHOR, ELSEWHERE = "the author", "the author, elsewhere"
FEWEST = 10  # pairs
TOKENS_A_WORD = 3  # of French, at most; what is too long is cut
PRIOR = 1.0  # variance of a stage's strength in the Bradley-Terry model, in nats: one that always wins stays finite

Reading = dict[str, Any]


# --- drawing ----------------------------------------------------------------------------------------------------------


def ends(text: str) -> list[int]:
    """Where sentences end; not at « ? » or « ! » before a small letter, as in « Qui est là ? demanda K. »."""
    found = [match.end() for match in metrics.SENTENCE_END.finditer(text)]
    return [end for end in found if not re.match(r"\s+[a-zà-ÿœ]", text[end:])]


def places(text: str, words: int) -> list[tuple[str, str]]:
    """The text in pairs of some lines and what follows them, half of `words` and `words` long, each to a sentence's end.

    They do not overlap: the lines of one pair must not show the passage of another.
    """
    cuts = [0]
    for end in ends(text):
        wanted = words / 2 if len(cuts) % 2 else words
        if len(metrics.words(text[cuts[-1] : end])) >= wanted:
            cuts.append(end)
    triples = zip(cuts[::2], cuts[1::2], cuts[2::2], strict=False)
    return [(text[start:middle].strip(), text[middle:end].strip()) for start, middle, end in triples]


def level(one: str, other: str) -> tuple[str, str]:
    """Both cut at sentence ends that leave them nearest in length, and long; where no sentence ends, nothing is cut."""

    def worth(pair: tuple[str, str]) -> int:
        short, long = sorted(len(metrics.words(part)) for part in pair)
        return short - 2 * (long - short)

    first, second = ([text[:end] for end in ends(text)] or [text] for text in (one, other))
    return max(itertools.product(first, second), key=worth)


def deck(stages: Sequence[str], count: int, rng: random.Random) -> list[list[str]]:
    """Who is left and who is right in each pair, stages and sides in turn, shuffled.

    Stages meet in a ring, each its two neighbours: the fewest pairs in which all are compared.
    """
    tests = itertools.cycle([[AUTHOR, stage] for stage in stages])
    ring = itertools.cycle([[one, other] for one, other in zip(stages, [*stages[1:], stages[0]], strict=True)])
    controls = itertools.cycle([pair for stage in reversed(stages) for pair in ([AUTHOR, ELSEWHERE], [stage, stage])])
    order = itertools.cycle([tests, tests, tests, ring if len(stages) > 1 else tests, controls])
    seen: Counter[str] = Counter()
    sides = []
    for kind in itertools.islice(order, count):
        pair = next(kind)
        name = " ".join(sorted(pair))
        swapped = (seen[name] + (stages.index(pair[1]) if pair[1] in stages else 0)) % 2
        seen[name] += 1
        sides.append(pair[::-1] if swapped else pair)
    rng.shuffle(sides)
    return sides


def rows_of(evidence: dict[str, Any], task: str) -> list[str]:
    """The texts of the file that a report's task scored. Raises BadInput where it has no such task, or another file is there."""
    if task not in evidence["tasks"]:
        raise BadInput(f"report {evidence['run']} has no task {task}: evaluate with it")
    path, value = evidence["tasks"][task]["path"], evidence["tasks"][task]["file_sha256"]
    if changed(Path(), {path: value}):
        raise BadInput(f"{path} is not the text that report {evidence['run']} scored: run the evaluation again")
    return [row["text"] for row in read_rows(Path(path))]


def draw(evidence: dict[str, Any], args: argparse.Namespace) -> Reading:
    """The pairs of a report. Raises BadInput when it has no samples, or other weights, or its book is too short."""
    from eval import generation, models
    from train.stages import load_chain

    stages = [name for name, stage in evidence["stages"].items() if stage and stage["samples"]]
    if not stages:
        raise BadInput(f"report {evidence['run']} has no samples: no stage in it has written anything")
    trained_on = metrics.CopyFinder(rows_of(evidence, "novel_train"))
    found = [
        (lines, passage)
        for text in rows_of(evidence, "novel_heldout")
        for lines, passage in places(text, args.words)
        if trained_on.longest(f"{lines} {passage}")["words"] <= metrics.LONGEST_COPY
    ]
    count = min(args.pairs, len(found) * 10 // 11)  # one in ten needs a second passage
    if count < FEWEST:
        raise BadInput(
            f"the held-out pages are too short for {FEWEST} pairs: {len(found)} passages of {args.words} words; "
            "lower --words, or hold out more of the novel"
        )
    rng = random.Random(args.seed)
    rng.shuffle(found)
    sides = deck(stages, count, rng)
    texts: list[dict[str, list[str]]] = [{AUTHOR: [passage]} for _, passage in found[:count]]
    for number, pair in enumerate(sides):
        if ELSEWHERE in pair:
            texts[number][ELSEWHERE] = [found.pop()[1]]

    rows = models.present(models.candidates(load_chain(args.recipes, args.curriculum)), stages)
    for row in rows:
        if wrong := changed(Path(), evidence["stages"][row.name]["weights"]):
            raise BadInput(f"{wrong[0]} is not what report {evidence['run']} measured: run the evaluation again")
    decoding = generation.decoding(TOKENS_A_WORD * args.words)
    for row, model, tokenizer in models.loaded(rows, args.device, models.DTYPES[args.dtype]):
        print(f"{row.name} is writing", file=sys.stderr)
        for number, pair in enumerate(sides):
            if times := pair.count(row.name):
                ids = generation.encode(tokenizer, found[number][0])
                drawn = generation.draw(model, tokenizer, ids, times, args.seed + number, decoding, open_ended=True)
                texts[number][row.name] = [to_convention(sample.text).strip() for sample in drawn]
        del model  # before the next is read

    pairs = []
    for number, (left, right) in enumerate(sides):
        shown = level(texts[number][left][0], texts[number][right][-1])
        pairs.append({"lines": found[number][0], "by": [left, right], "texts": list(shown), "answers": []})
    weights = {name: evidence["stages"][name]["weights"] for name in stages}
    drawn_from = {"seed": args.seed, "words": args.words, "weights": weights}
    return {"id": digest([drawn_from, pairs])[:16], **drawn_from, "pairs": pairs, "figures": None}


# --- answers ----------------------------------------------------------------------------------------------------------


def answers_file(target: Path, reader: str) -> Path:
    """Where a reader's answers are, beside the report. Raises BadInput on a name that could be a path."""
    if not re.fullmatch(r"[\w-]{1,30}", reader):
        raise BadInput(f"{reader!r} is no reader's name: letters, digits and - only, at most 30")
    return target.with_name(f"{target.stem}.answers.{reader}.jsonl")


def merged(before: Reading | None, weights: dict[str, Any], target: Path) -> Reading | None:
    """The pairs with the answers that are beside the report, and the figures; None where there are none, or the weights changed.

    A reader's first answer to a pair counts. Raises BadInput on a damaged file of answers, or one to other pairs.
    """
    if before is None:
        return None
    if any(weights.get(name) != known for name, known in before["weights"].items()):
        print("blind reading left out: a stage has other weights now; make reading draws new pairs", file=sys.stderr)
        return None
    pairs: list[dict[str, Any]] = [pair | {"answers": []} for pair in before["pairs"]]
    for path in sorted(target.parent.glob(f"{glob.escape(target.stem)}.answers.*.jsonl")):
        seen = set()
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                given = json.loads(line)
                if given["reading"] != before["id"]:
                    raise BadInput(f"{path} answers other pairs than those of {target}: move it elsewhere")
                answer = {
                    "reader": str(given["reader"]),
                    "choice": [0, 1][given["choice"]],
                    "sure": bool(given["sure"]),
                }
                pair = pairs[given["pair"]]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise BadInput(
                    f"{path}, line {number}, is no whole answer: remove it, or save the answers again"
                ) from error
            if given["pair"] not in seen:
                seen.add(given["pair"])
                pair["answers"].append(answer)
    read = any(pair["answers"] for pair in pairs)
    return before | {"pairs": pairs, "figures": figures(pairs, list(before["weights"])) if read else None}


def share(chosen: Sequence[bool], sure: Sequence[bool]) -> dict[str, Any]:
    """How many of the answers chose something, with Wilson's 95 % interval, and how many were sure."""
    taken = sum(chosen)
    limits = binomtest(taken, len(chosen)).proportion_ci(method="wilson") if chosen else None
    return {
        "taken": taken,
        "answers": len(chosen),
        "interval": [float(limits.low), float(limits.high)] if limits else None,
        "sure": sum(sure),
    }


def bradley_terry(won: Sequence[tuple[str, str]], stages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Strengths of stages from (winner, loser), in nats, with 95 % intervals (Bradley and Terry 1952).

    It is a logistic regression with a normal prior around zero; the intervals are from its Hessian (Laplace).
    """
    from sklearn.linear_model import LogisticRegression  # here: slow to import

    table = np.array([[(stage == winner) - (stage == loser) for stage in stages] for winner, loser in won], dtype=float)
    both = np.vstack([table, -table])  # a regression wants both outcomes: each game from both sides, half each
    outcome, half = np.repeat([1, 0], len(table)), np.full(2 * len(table), 0.5)
    fit = LogisticRegression(C=PRIOR, fit_intercept=False, tol=1e-8).fit(both, outcome, sample_weight=half)
    strengths = fit.coef_[0]
    chance = expit(table @ strengths)
    hessian = table.T @ (table * (chance * (1 - chance))[:, None]) + np.eye(len(stages)) / PRIOR
    errors = 1.96 * np.sqrt(np.diag(np.linalg.inv(hessian)))
    return {
        stage: {
            "won": sum(winner == stage for winner, _ in won),
            "answers": sum(stage in game for game in won),
            "strength": float(strength),
            "interval": [float(strength - error), float(strength + error)],
        }
        for stage, strength, error in zip(stages, strengths, errors, strict=True)
    }


def agreement(pairs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How often two readers of a pair chose the same side, and Cohen's kappa; None without two readers of a pair."""
    from sklearn.metrics import cohen_kappa_score

    both = [
        (one["choice"], other["choice"])
        for pair in pairs
        for one, other in itertools.combinations(sorted(pair["answers"], key=lambda answer: answer["reader"]), 2)
    ]
    if not both:
        return None
    same = sum(one == other for one, other in both)
    varied = len({choice for choices in both for choice in choices}) > 1  # else kappa is 0 / 0
    kappa = float(cohen_kappa_score(*zip(*both, strict=True))) if varied else None
    return {"same": same, "of": len(both), "kappa": kappa}


def figures(pairs: Sequence[dict[str, Any]], stages: Sequence[str]) -> dict[str, Any]:
    """What the answers say, readers together: how often each stage was taken for the author, controls, stage against stage."""
    given = [(pair["by"], answer["choice"], answer["sure"]) for pair in pairs for answer in pair["answers"]]

    def counted(wanted: set[str], choice: str | int) -> dict[str, Any]:
        """Answers to the pairs of these two: how often this one, or this side, was chosen."""
        some = [(choice in (chosen, by[chosen]), sure) for by, chosen, sure in given if set(by) == wanted]
        return share([chosen for chosen, _ in some], [sure for _, sure in some])

    alone = [(by, chosen, sure) for by, chosen, sure in given if by[0] == by[1]]
    games = [(by[chosen], by[1 - chosen]) for by, chosen, _ in given if set(by) <= set(stages) and by[0] != by[1]]
    return {
        "readers": sorted({answer["reader"] for pair in pairs for answer in pair["answers"]}),
        "agreement": agreement(pairs),
        "stages": {stage: counted({AUTHOR, stage}, stage) for stage in stages},
        "author": counted({AUTHOR, ELSEWHERE}, AUTHOR),
        "same": share([chosen == 0 for _, chosen, _ in alone], [sure for *_, sure in alone]),
        "left": share([chosen == 0 for _, chosen, _ in given], [sure for *_, sure in given]),
        "preferred": bradley_terry(games, stages) if games else None,
    }


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    from eval import models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--run", type=run_name, required=True, help="name of the report")
    option("--out", type=Path, default=Path("eval/reports"), help="folder of the report")
    option("--pairs", type=positive, default=40, help="fewer where the held-out block is short (default %(default)s)")
    option("--words", type=positive, default=100, help="of a passage; the lines are half as long (default %(default)s)")
    args = models.parse(parser)
    if args.pairs < FEWEST:
        parser.error(f"--pairs must be at least {FEWEST}")
    target = args.out / f"{args.run}.json"
    lock(target)
    evidence = report.load(target)
    evidence["reading"] = draw(evidence, args)
    report.check(evidence, target)
    write_json(target, evidence)
    page = report.write(evidence, args.out).with_suffix(".reading.html")
    print(f"{len(evidence['reading']['pairs'])} pairs: {page}")


if __name__ == "__main__":
    run(main)
