"""One line for each stage: did it learn, memorise, degenerate? The thresholds, with their reasons.

for stage, line in verdict.lines(report).items(): ...
"""

from typing import Any

HELDOUT = "_heldout"  # how the names of the tasks end that say whether a stage learned
EXTRACTABLE = 0.05  # share of the trained chunks of 50 tokens; stock phrases do not explain one in twenty
# Those below are calibrated on novels by people: bench/calibrate_verdicts.py, false alarms in bench/reports/verdicts.md.
COPY_WORDS = 15  # 46 of 49 novels repeat no sequence of so many words; two novels of one author share at most 9
COPY_TIMES = 2  # and this many times the longest sequence that the author's held-out pages share with the rest
# How far above the author's own pages, which contain refrains, names and headings too; and what is said.
DEGENERATED = {
    "looping": (0.1, "{:.0%} of samples loop"),
    "rep_4": (0.05, "{:.0%} of 4-grams are repeated"),  # people reach 0.03
    "not_french": (0.1, "{:.0%} of words are not French"),  # people reach 0.08
    "artefacts": (0.5, "{:.1f} lines of OCR debris per sample"),
}

EXPLAINED = (
    "Learned: on a held-out text the 95 % interval of the paired difference to the stage before is below zero. "
    f"Memorised: {EXTRACTABLE:.0%} or more of the trained chunks of 50 tokens are extractable (drawn word for word once in a "
    "thousand draws), and at least twice as many as of the held-out ones; or a sample copies "
    f"{COPY_WORDS} words or more, and {COPY_TIMES} times the longest sequence that the author's held-out pages share with the "
    "rest. Degenerated: above the author's own pages by more than "
    f"{', '.join(text.format(threshold) for threshold, text in DEGENERATED.values())}."
)


def heldout(difference: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The differences on held-out texts, where there are any."""
    return {task: score for task, score in difference["scores"].items() if task.endswith(HELDOUT) and score}


def change(task: str, difference: dict[str, Any]) -> str:
    return f"{task} {difference['bits_per_byte']:+.3f} bits per byte"


def sides(difference: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Held-out texts on which it is surely better, and on which it is surely worse."""
    scores = {task: score for task, score in heldout(difference).items() if score["interval"]}
    better = [change(task, score) for task, score in scores.items() if score["interval"][1] < 0]
    worse = [change(task, score) for task, score in scores.items() if score["interval"][0] > 0]
    return better, worse


def learned(name: str, report: dict[str, Any]) -> str | None:
    """From the paired differences on held-out text; None for the base, or when nothing was compared."""
    difference = report["differences"].get(name)
    if not difference:
        return None
    (better, worse), against = sides(difference), difference["against"]
    line = f"learned ({', '.join(better)} against {against})" if better else f"did not learn (against {against})"
    line += f", worse on {', '.join(worse)}" if worse else ""
    for key, other in report["differences"].items():
        if key == f"{name} - {other['against']}":  # against the full model below it, or its ablation
            ahead, behind = sides(other)
            line += f"; ahead of {other['against']} on {', '.join(ahead)}" if ahead else ""
            line += f"; behind {other['against']} on {', '.join(behind)}" if behind else ""
    return line


def price(name: str, report: dict[str, Any]) -> str:
    """What another form of the same weights costs on held-out text; negative when it gains."""
    difference = report["differences"].get(name)
    if not difference:
        return "not compared"
    figures = [change(task, score) for task, score in heldout(difference).items()]
    form = "with its adapter before the first step" if report["stages"][name]["form"] == "start" else "in another form"
    return f"the weights of {difference['against']} {form}: {', '.join(figures) or 'not compared'}"


def memorised(stage: dict[str, Any], report: dict[str, Any]) -> str | None:
    """From the probability of trained chunks, and from copies in samples; None when neither was measured."""
    reasons = []
    memory = stage["memorisation"]
    if memory and memory["train"]["extractable"] >= max(EXTRACTABLE, 2 * memory["heldout"]["extractable"]):
        reasons.append(f"{memory['train']['extractable']:.0%} of trained chunks extractable")
    copies = [sample["copied"]["words"] for sample in stage["samples"] if sample["copied"]]
    usual = max(report["reference"]["copied"], default=0) if report["reference"] else 0
    if copies and max(copies) >= max(COPY_WORDS, COPY_TIMES * usual):
        reasons.append(f"a sample copies {max(copies)} words")
    if reasons:
        return f"memorised ({', '.join(reasons)})"
    return "did not memorise" if memory or copies else None


def alarms(found: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """The figures of DEGENERATED that are above their threshold; `usual` has the author's own."""
    return [key for key, (limit, _) in DEGENERATED.items() if (found[key] or 0) > limit + (usual.get(key) or 0)]


def degenerated(stage: dict[str, Any], report: dict[str, Any]) -> str | None:
    """From the samples, against the author's own pages; None without samples."""
    found = stage["degeneration"]
    if not found:
        return None
    raised = alarms(found, report["reference"]["degeneration"] if report["reference"] else {})
    reasons = [DEGENERATED[key][1].format(found[key]) for key in raised]
    return f"degenerated ({', '.join(reasons)})" if reasons else "did not degenerate"


def line(name: str, stage: dict[str, Any] | None, report: dict[str, Any]) -> str:
    """The verdict on one stage."""
    if stage is None:
        return "not measured"
    if stage["form"]:
        return f"{price(name, report)}."
    parts = [learned(name, report), memorised(stage, report), degenerated(stage, report)]
    if stage["gate"] and not stage["gate"]["passed"]:
        parts.insert(0, "not the weights that its training recorded")
    return ("; ".join(part for part in parts if part) or "nothing to judge it by") + "."


def lines(report: dict[str, Any]) -> dict[str, str]:
    """{stage: its verdict}, in the chain's order."""
    return {name: line(name, stage, report) for name, stage in report["stages"].items()}
