"""The bench's evidence, one JSON file, and the page made from it and nothing else."""

import json
import statistics
from pathlib import Path
from typing import Any

from bench.gpu_runs import CARD
from prep.common import BadInput, atomic_write, commit

GIB = 2**30
KEYS = {"what", "machine", "versions", "commit", "model", "settings", "matrix_products", "runs"}
RUN_KEYS = {"id", "recipe", "variant", "free_gib", "repetition", "fingerprint", "changes", "status", "wall_s"}
NOT_RECIPES = "A test of the bench itself, on a tiny model and a CPU: no measurement of the recipes."
RECIPES = "The recipes on TinyLlama's architecture with random weights."


def load(path: Path) -> dict[str, Any] | None:
    """The report, or None if there is none yet. Raises BadInput when it is damaged."""
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise TypeError("a JSON object is expected")
        missing = KEYS - set(report)
        for run in report.get("runs", []):
            missing |= RUN_KEYS - set(run)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error}); move it away to start anew") from error
    if missing:
        raise BadInput(
            f"{path} is no report of this bench, or damaged: {', '.join(sorted(missing))} missing; move it away"
        )
    return report


def check_same(path: Path, report: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Figures of two machines, versions or models do not go into one report. Raises BadInput."""
    for key in ("what", "machine", "versions", "model", "settings"):
        if report[key] != fresh[key]:
            old, new = json.dumps(report[key]), json.dumps(fresh[key])
            raise BadInput(f"{path} was made with another {key} ({old}; now {new}); name another file with --out")


def save(path: Path, report: dict[str, Any]) -> None:
    """The JSON, and beside it the page."""
    with atomic_write(path) as handle:
        json.dump(report, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
    with atomic_write(path.with_suffix(".md")) as handle:
        handle.write(page(report))


def put(report: dict[str, Any], run: dict[str, Any]) -> None:
    """Add a run, in place of an earlier one of that name."""
    report["runs"] = [other for other in report["runs"] if other["id"] != run["id"]] + [run]


def achievable(report: dict[str, Any]) -> float | None:
    """FLOP a second that large matrix products reached on this machine: the best of all that were timed, since what
    disturbs the machine only makes them slower."""
    return max([product["flops"] for product in report["matrix_products"]], default=None)


def groups(report: dict[str, Any]) -> dict[tuple[str, str, float | None], list[dict[str, Any]]]:
    """The repetitions of each recipe, variant and part of the card, in the order of their first run."""
    found: dict[tuple[str, str, float | None], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        found.setdefault((run["recipe"], run["variant"], run["free_gib"]), []).append(run)
    return found


def speed(runs: list[dict[str, Any]]) -> float | None:
    """Tokens a second, median of the repetitions; None if one of them failed or none was run."""
    if not runs or any(run["status"] != "ok" for run in runs):
        return None
    return statistics.median(run["tokens_per_s"] for run in runs)


def number(value: float | None, form: str, scale: float = 1) -> str:
    return "–" if value is None else format(value / scale, form)


def highest(runs: list[dict[str, Any]], of: str) -> float | None:
    """The largest of a memory figure over the repetitions."""
    found = [run["memory"].get(of) for run in runs if run["status"] == "ok"]
    return max([value for value in found if value is not None], default=None)


def row(key: tuple[str, str, float | None], runs: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """One line of the table."""
    recipe, variant, free = key
    card = "whole" if free is None else f"{free:g} GiB"
    bad = next((run for run in runs if run["status"] != "ok"), None)
    if bad:
        reason = bad["reason"].replace("|", "/")
        done = f", {sum(run['status'] == 'ok' for run in runs)} of {len(runs)} were well" if len(runs) > 1 else ""
        return f"| {recipe} | {variant} | {card} | **{bad['status']}**{done}: {reason} |" + " – |" * 9
    rates = sorted(run["tokens_per_s"] for run in runs)
    rate = statistics.median(rates)
    spread = f" ({rates[0]:,.0f} to {rates[-1]:,.0f})" if len(rates) > 1 else ""
    others = groups(report)
    against = [
        None if key[1] == name else speed(others.get((recipe, name, free), [])) for name in ("shipped", "reference")
    ]
    peak = achievable(report)
    allocated, planned = highest(runs, "peak_allocated"), runs[-1]["planned"].get("peak")
    loading = highest(runs, "peak_while_loading")
    driver = max([run["driver_peak"] for run in runs if run["driver_peak"] is not None], default=None)
    retries = highest(runs, "retries")
    cells = [
        f"{rate:,.0f}{spread}",
        *(number(rate / other if other else None, ".2f") for other in against),
        number(statistics.median(run["step_s"] for run in runs), ",.0f", 1e-3),
        number(rate * runs[-1]["flops_per_token"] / peak if peak else None, ".0%"),
        number(allocated, ".2f", GIB)
        + (f" (loading {loading / GIB:.2f})" if loading and allocated and loading > allocated else ""),
        number(highest(runs, "peak_reserved"), ".2f", GIB) + (f" ({retries:.0f} retries)" if retries else ""),
        number(driver, ".2f", GIB),
        number(planned, ".2f", GIB) + (f" ({planned / allocated - 1:+.0%})" if planned and allocated else ""),
    ]
    return f"| {recipe} | {variant} | {card} | " + " | ".join(cells) + " | " + f"{len(runs)} |"


def against_plan(runs: list[dict[str, Any]]) -> str | None:
    """Where a plan is wrong, if it is: planned and measured bytes of the allocator at three moments; None without both."""
    cells = []
    for moment, mark in (("loaded", "loaded"), ("at_optimizer_step",) * 2, ("peak", "peak_allocated")):
        expected, found = runs[-1]["planned"].get(moment), highest(runs, mark)
        if not expected or not found:
            return None
        cells.append(f"{expected / GIB:.2f} / {found / GIB:.2f} ({expected / found - 1:+.0%})")
    card = "whole" if runs[-1]["free_gib"] is None else f"{runs[-1]['free_gib']:g} GiB"
    return f"| {runs[-1]['recipe']} | {runs[-1]['variant']} | {card} | " + " | ".join(cells) + " |"


def goals(report: dict[str, Any]) -> list[tuple[str, float | None, float, bool | None]]:
    """What is aimed at: name, figure, least figure wanted, and whether it is reached (None: not measured)."""
    found = groups(report)
    peak = achievable(report)

    def ratio(recipe: str, free: float | None) -> float | None:
        ours, theirs = (speed(found.get((recipe, name, free), [])) for name in ("shipped", "reference"))
        return ours / theirs if ours and theirs else None

    wanted: list[tuple[str, float | None, float]] = []
    for recipe in ("2a", "2b", "2c"):
        runs = found.get((recipe, "shipped", CARD), [])
        survived = sum(run["status"] == "ok" for run in runs) / len(runs) if runs else None
        wanted.append((f"{recipe} runs within {CARD:g} GiB (share of its runs)", survived, 1.0))
    whole = found.get(("2a", "shipped", None), [])
    rate = speed(whole)
    used = rate * whole[-1]["flops_per_token"] / peak if rate and peak else None
    wanted += [
        (f"2a against the reference within {CARD:g} GiB, tokens a second", ratio("2a", CARD), 1.3),
        (f"2b against the reference within {CARD:g} GiB, tokens a second", ratio("2b", CARD), 2.0),
        ("2a against the reference on the whole card, tokens a second", ratio("2a", None), 2.0),
        ("2a on the whole card, share of the achievable peak", used, 0.5),
    ]
    return [(name, value, least, None if value is None else value >= least) for name, value, least in wanted]


def profile_table(run: dict[str, Any], most: int = 15) -> list[str]:
    """The kernels that took longest, with their share of all the time in kernels."""
    total = sum(event["microseconds"] for event in run["profile"]) or 1
    lines = [f"### {run['id']}", "", "| share | ms | calls | kernel |", "|---|---|---|---|"]
    lines += [
        f"| {event['microseconds'] / total:.1%} | {event['microseconds'] / 1e3:,.1f} | {event['calls']} | "
        f"`{event['name'][:90].replace('|', '/')}` |"
        for event in run["profile"][:most]
    ]
    return [*lines, ""]


def page(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    machine, peak = report["machine"], achievable(report)
    name = (
        f"{machine['gpu']}, {machine['gpu_bytes'] / GIB:.1f} GiB, driver {machine['driver']}"
        if machine["gpu"]
        else "no GPU"
    )
    tiny = report["what"] == NOT_RECIPES
    lines = [
        "# Speed and memory of the recipes" if not tiny else "# The bench, tested on itself", "", report["what"], "",
        f"Machine: {name}; {machine['cpu']}, {machine['cores']} cores. "
        + ", ".join(f"{package} {version}" for package, version in report["versions"].items())
        + f"; {commit(report['commit'])}. {report['model']['parameters']:,} parameters.",
        "",
    ]  # fmt: skip
    if peak:
        product = report["matrix_products"][-1]
        lines += [
            f"Achievable peak: {peak / 1e12:,.3g} TFLOP/s, by {product['dtype']} products of "
            f"{product['n']} x {product['n']} matrices.",
            "",
        ]
    runs = {key: group for key, group in groups(report).items() if "profile" not in group[-1]}
    lines += [
        "| recipe | variant | card | tokens/s | x shipped | x reference | ms a step | MFU | allocated, GiB | "
        "reserved, GiB | driver, GiB | planned, GiB (against allocated) | runs |",
        "|---" * 13 + "|",
        *(row(key, group, report) for key, group in runs.items()),
        "",
        "Memory is the peak. MFU: model FLOP utilisation, tokens a second x operations a token / achievable peak; "
        "operations repeated by checkpointing are not counted twice. Formulas: [README.md](README.md).",
        "",
    ]
    if not tiny:
        lines += ["| goal | wanted | measured | reached |", "|---|---|---|---|"]
        words = {True: "yes", False: "**no**", None: "not measured"}
        lines += [
            f"| {goal} | {least:g} | {number(value, '.2f')} | {words[reached]} |"
            for goal, value, least, reached in goals(report)
        ]
        lines.append("")
    planned = list(filter(None, map(against_plan, runs.values())))
    if planned:
        lines += [
            "Planned / measured, GiB of the allocator: where the plan is off.",
            "",
            "| recipe | variant | card | model loaded | optimiser step | peak |",
            "|---|---|---|---|---|---|",
            *planned,
            "",
        ]
    profiles = [run for run in report["runs"] if "profile" in run]
    if profiles:
        lines += ["## Where the time goes", ""]
        for run in profiles:
            lines += profile_table(run)
    return "\n".join(lines).rstrip() + "\n"
