"""Blind reading: readers whose figures closed form gives, the commands on tiny models, the page in a real Chromium."""

import html
import json
import math
import random
import shutil
import urllib.parse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.special import expit
from small_tokenizers import tales
from tiny_curriculum import call_main, write_rows

from eval import evaluation, reading, report, tables, workbench
from eval.reading import AUTHOR, ELSEWHERE
from prep.common import BadInput

STAGES = ["base", "2a", "2b", "2c"]
Z = 1.959964


def wilson(taken: int, of: int) -> list[float]:
    """Wilson's interval, as he wrote it (1927)."""
    p, half = taken / of, Z * math.sqrt(taken / of * (1 - taken / of) / of + Z**2 / (4 * of**2))
    return [(p + Z**2 / (2 * of) + sign * half) / (1 + Z**2 / of) for sign in (-1, 1)]


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [STAGES, STAGES[:2], STAGES[:1]])
def test_stages_and_sides_are_balanced(stages: list[str]) -> None:
    sides = reading.deck(stages, 80, random.Random(1))
    assert sides != reading.deck(stages, 80, random.Random(2))
    left = Counter(pair[0] == AUTHOR for pair in sides if AUTHOR in pair and ELSEWHERE not in pair)
    assert left[True] == left[False]
    counts = Counter(name for pair in sides for name in pair if AUTHOR in pair and ELSEWHERE not in pair)
    assert {counts[stage] for stage in stages} == {(48 if len(stages) > 1 else 64) // len(stages)}
    games = Counter(name for pair in sides if pair[0] != pair[1] and set(pair) <= set(stages) for name in pair)
    assert set(games.values()) == ({32 // len(stages)} if len(stages) > 1 else set())
    assert sum(ELSEWHERE in pair for pair in sides) == sum(pair[0] == pair[1] for pair in sides) == 8


def test_passages_end_with_sentences_and_show_none_of_another() -> None:
    text = "Il neigeait sur le village. Qui est là ? demanda-t-elle.\n\n— Moi, dit K. en entrant. Il se tut. " * 20
    found = reading.places(text, 10)
    assert len(found) > 8
    place = 0
    for part in (part for pair in found for part in pair):
        assert part.endswith((".", "?")) and (place := text.index(part, place) + len(part))
    assert [text[:end].split()[-1] for end in reading.ends(text)[:3]] == ["village.", "demanda-t-elle.", "entrant."]
    assert reading.level("Un deux trois. Quatre cinq six sept huit neuf dix onze.", "Un deux trois quatre. Cinq") == (
        "Un deux trois.",
        "Un deux trois quatre.",
    )
    assert reading.level("Un deux.", "trois quatre")[1] == "trois quatre"


# --- simulated readers ------------------------------------------------------------------------------------------------


def read(choose: Callable[[list[str]], int], readers: int = 1) -> list[dict[str, Any]]:
    """80 pairs, each with the answers of readers who choose a side by who wrote them."""
    return [
        {"by": by, "answers": [{"reader": f"r{n}", "choice": choose(by), "sure": True} for n in range(readers)]}
        for by in reading.deck(STAGES, 80, random.Random(0))
    ]


def right(by: list[str]) -> int:
    """The author; of two stages the later."""
    return by.index(AUTHOR) if AUTHOR in by else by.index(max(by, key=STAGES.index))


def test_one_who_is_always_right_or_always_wrong() -> None:
    """Each stage meets two others in eight pairs: right, the last is always preferred, the first never."""
    for choose, taken, won in ((right, 0, [0, 8, 8, 16]), (lambda by: 1 - right(by), 12, [16, 8, 8, 0])):
        figures = reading.figures(read(choose, readers=2), STAGES)
        for stage in STAGES:
            share = figures["stages"][stage]
            assert (share["taken"], share["answers"], share["sure"]) == (2 * taken, 24, 24)
            assert share["interval"] == pytest.approx(wilson(2 * taken, 24), abs=1e-6)
        assert figures["author"]["taken"] == (0 if taken else 16)
        assert [figures["preferred"][stage]["won"] for stage in STAGES] == won
        assert figures["agreement"] == {"same": 80, "of": 80, "kappa": pytest.approx(1)}


def test_one_who_clicks_left() -> None:
    """He tells nothing: half of each control and of the stages together, and the last row says why."""
    figures = reading.figures(read(lambda by: 0), STAGES)
    for share in figures["stages"].values():
        assert share["interval"] == pytest.approx(wilson(share["taken"], 12), abs=1e-6)
    assert sum(share["taken"] for share in figures["stages"].values()) == 24  # of 48
    assert figures["author"]["taken"] == 4 and figures["same"]["taken"] == 8 == figures["same"]["answers"]
    assert figures["left"] == {"taken": 80, "answers": 80, "interval": pytest.approx(wilson(80, 80)), "sure": 80}
    assert figures["agreement"] is None


def test_bradley_terry_is_the_closed_form_of_two() -> None:
    """With strengths b and -b and a standard normal prior, the wins w of n games satisfy w - n / (1 + exp(-2 b)) = b."""
    fitted = reading.bradley_terry([("2c", "2a")] * 9 + [("2a", "2c")] * 3, ["2a", "2c"])
    b = fitted["2c"]["strength"]
    assert fitted["2a"]["strength"] == pytest.approx(-b) and 9 - 12 * expit(2 * b) == pytest.approx(b, abs=1e-4)
    # Its Hessian is [[1 + v, -v], [-v, 1 + v]] with v = n p (1 - p), so the variance is (1 + v) / (1 + 2 v).
    v = 12 * expit(2 * b) * expit(-2 * b)
    assert fitted["2c"]["interval"][1] - b == pytest.approx(1.96 * math.sqrt((1 + v) / (1 + 2 * v)), abs=1e-3)
    always = reading.bradley_terry([("2c", "2a")] * 50, ["2a", "2c"])
    assert 1 < always["2c"]["strength"] < 5 and (always["2c"]["won"], always["2a"]["answers"]) == (50, 50)


# --- the commands, on tiny models -------------------------------------------------------------------------------------


EVALUATE = ["--run", "tiny", "--samples", "1", "--max-new-tokens", "4", "--limit", "1", "--device", "cpu"]
EVALUATE += ["--tasks", "novel_heldout", "novel_train"]
READ = ["--run", "tiny", "--pairs", "10", "--words", "8", "--device", "cpu"]
PAGE = Path("eval/reports/tiny.json")


@pytest.fixture(scope="module")
def drawn_place(curriculum: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(curriculum, tmp_path_factory.mktemp("reading") / "place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rows(Path("data/2c.heldout.jsonl"), [tales()[2][:6_000]])
        call_main(evaluation, *EVALUATE)
        call_main(reading, *READ)
    return folder


@pytest.fixture
def drawn(drawn_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The pairs of a report on tiny models, in a copy of its folder that is the working directory."""
    monkeypatch.chdir(shutil.copytree(drawn_place, tmp_path / "place"))
    return report.load(PAGE)["reading"]


def save_answers(drawn: dict[str, Any], reader: str, choice: int = 0) -> Path:
    path = reading.answers_file(PAGE, reader)
    answer = {"reading": drawn["id"], "reader": reader, "choice": choice, "sure": False}
    path.write_text("".join(json.dumps(answer | {"pair": n}) + "\n" for n in range(len(drawn["pairs"]))))
    return path


@pytest.mark.slow
def test_answers_of_two_readers_are_merged_by_the_evaluation(drawn: dict[str, Any], capsys: Any) -> None:
    heldout = " ".join(json.loads(Path("data/2c.heldout.jsonl").read_text())["text"].split())
    for pair in drawn["pairs"]:
        assert " ".join(pair["lines"].split()) in heldout and len(pair["texts"]) == 2
        for by, text in zip(pair["by"], pair["texts"], strict=True):
            assert (" ".join(text.split()) in heldout) == by.startswith(AUTHOR)
    before = PAGE.read_bytes()
    call_main(reading, *READ)
    assert json.loads(before)["reading"] == report.load(PAGE)["reading"] == drawn  # the same seed, the same pairs

    first = save_answers(drawn, "anne")
    save_answers(drawn, "bert", choice=1)
    once = first.read_text()
    first.write_text(once + once.replace('"choice": 0', '"choice": 1'))  # a second time: not counted
    call_main(evaluation, *EVALUATE)
    assert "not measured again: base, 2a, 2b, 2c" in capsys.readouterr().err
    evidence = report.load(PAGE)
    figures = evidence["reading"]["figures"]
    assert figures["readers"] == ["anne", "bert"] and figures["left"]["answers"] == 20 == 2 * figures["left"]["taken"]
    assert figures["agreement"] == {"same": 0, "of": 10, "kappa": 0}
    page = PAGE.with_suffix(".md").read_text()
    assert "## Blind reading" in page and "Two chose the same side in 0% of 10 cases" in page and "### Pair 10" in page
    assert tables.preferred(evidence)[1] and "the left one | 10 of 20" in " ".join(page.split())

    weights = {name: known | {"x": "0"} for name, known in drawn["weights"].items()}
    assert reading.merged(drawn, weights, PAGE) is None and "other weights" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_input_is_one_line(drawn: dict[str, Any]) -> None:
    whole = json.loads(PAGE.read_text())
    answers = save_answers(drawn, "anne")
    content = answers.read_text()
    for bad, message in (
        (content[: len(content) // 2 + 9], r"tiny\.answers\.anne\.jsonl, line 6, is no whole answer"),
        (content.replace(drawn["id"], "other"), "answers other pairs than those of"),
        (content.replace('"pair": 3', '"pair": 300'), "line 4, is no whole answer"),
        (content.replace('"choice": 0', '"choice": 2'), "line 1, is no whole answer"),
    ):
        answers.write_text(bad)
        with pytest.raises(BadInput, match=message):
            call_main(evaluation, *EVALUATE)
        assert json.loads(PAGE.read_text()) == whole
    answers.unlink()

    with pytest.raises(BadInput, match="no reader's name"):
        reading.answers_file(PAGE, "../anne")

    def refused(evidence: dict[str, Any], message: str, *arguments: str) -> None:
        PAGE.write_text(json.dumps(evidence))
        with pytest.raises(BadInput, match=message):
            call_main(reading, *READ, *arguments)

    refused(whole, "too short for 10 pairs: 1 passages of 500 words", "--words", "500")
    heldout = whole["tasks"]["novel_heldout"]
    seen = {"novel_heldout": heldout, "novel_train": heldout}  # a model that was trained on what is held out
    refused(whole | {"tasks": seen}, "too short for 10 pairs: 0 passages of 50 words", "--words", "50")
    refused(whole | {"tasks": {"novel_heldout": heldout}}, "report tiny has no task novel_train")
    Path("one").mkdir()
    shutil.copy("recipes/2a.yml", "one")
    refused(whole, "no stage 2b, 2c in the recipes; there are: base, 2a", "--recipes", "one")
    Path("outputs/2a/model.safetensors").write_bytes(b"")
    refused(whole, r"2a/model\.safetensors is not what report tiny measured")
    Path("data/2c.heldout.jsonl").write_text('{"text": "Il neigeait."}\n')
    refused(whole, r"2c\.heldout\.jsonl is not the text that report tiny scored")
    silent = {name: stage | {"samples": []} for name, stage in whole["stages"].items()}
    refused(whole | {"stages": silent}, "report tiny has no samples")


def test_the_workbench_appends_to_a_file_for_each_reader(tmp_path: Path) -> None:
    """The page sends all its answers each time; those that are there are not written again."""
    lines = [json.dumps({"reading": "1", "reader": "anne", "pair": n, "choice": 0, "sure": True}) for n in range(3)]
    for sent in (lines[:1], lines, lines[:2], [lines[0].replace("anne", "bert")]):
        workbench.answered(tmp_path / "demo.reading.html", "\n".join(sent))
    assert (tmp_path / "demo.answers.anne.jsonl").read_text().splitlines() == lines
    assert len((tmp_path / "demo.answers.bert.jsonl").read_text().splitlines()) == 1


def test_the_workbench_runs_no_scripts_but_its_own(tmp_path: Path) -> None:
    """A page of blind reading may have been sent by anybody."""
    for name in ("demo.json", "demo.reading.html"):
        shutil.copy(Path(report.__file__).parent / "reports" / name, tmp_path)
    page = tmp_path / "demo.reading.html"
    own = html.escape(page.read_text(encoding="utf-8"), quote=True)
    page.write_text("<script>somebody's own</script>")
    shown = workbench.report_page(page)
    assert "sandbox" not in shown[:20] and own in shown and "somebody" not in shown


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("device", "width", "scheme"), [("desk", 1280, "light"), ("phone", 360, "dark")])
def test_the_page_by_keyboard_alone(browser: Any, drawn_place: Path, device: str, width: int, scheme: str) -> None:
    """Begun, closed, continued and saved, on any screen."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    path = (drawn_place / PAGE).with_suffix(".reading.html")
    pairs = report.load(drawn_place / PAGE)["reading"]["pairs"]
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def press(*keys: str) -> None:
        for key in keys:
            ActionChains(browser).send_keys(key).perform()

    def text(selector: str) -> str:
        return browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)

    def start() -> None:
        browser.get(path.as_uri())
        press(*f"{device}-{scheme}", Keys.ENTER)

    start()
    assert "Pair 1 of 10" in text("#progress")
    for number in range(7):
        assert " ".join(pairs[number]["texts"][1].split()) in " ".join(text("#right").split())
        fits = "return [document.documentElement.scrollWidth, innerWidth, ...['left', 'right', 'ask'].flatMap(id => {"
        fits += "const b = document.getElementById(id).getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] })]"
        wide, inner, left, top, right, _, other, below, edge, _, *ask = browser.execute_script(fits)
        assert wide <= inner == width and edge <= width and ask[3] <= 741  # the buttons are always in sight
        assert (other == left and below > top) if device == "phone" else (other > right and below == top)
        models = not any(name.startswith(AUTHOR) for name in pairs[number]["by"])
        prefer = models and pairs[number]["by"][0] != pairs[number]["by"][1]
        assert text("#question") == ("Which would you go on reading?" if prefer else "Which is the author's?")
        press("1" if number % 2 else Keys.ARROW_RIGHT)
        assert text("#question") == "How sure are you?"
        press(Keys.ARROW_LEFT if number % 3 else "2")
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = (sum(map(int, colour[4:-1].split(","))) for colour in browser.execute_script(colours))
    assert (ink < 150 and paper > 650) if scheme == "light" else (ink > 600 and paper < 150)

    start()  # closed and opened again
    assert "Pair 8 of 10" in text("#progress")
    for _ in range(3):
        press("1", "2")
    assert "All 10 pairs read" in text("#progress") and text("#end").count("your choice") == 10
    choices = [*([1, 0] * 4)[:7], 0, 0, 0]
    told = [(pair["by"], pair["by"][choice]) for pair, choice in zip(pairs, choices, strict=True)]
    for stage in STAGES:
        taken = [chosen == stage for by, chosen in told if {*by} & {AUTHOR, ELSEWHERE} and stage in by]
        interval = "[{:.0f}, {:.0f}]".format(*(100 * limit for limit in wilson(sum(taken), len(taken))))
        assert f"{stage}, taken for the author: {sum(taken)} of {len(taken)}, a share of {interval} %" in text("#end")
    link = browser.execute_script("const a = document.getElementById('save'); return [a.download, a.href]")
    assert link[0] == f"tiny.answers.{device}-{scheme}.jsonl"
    saved = [json.loads(line) for line in urllib.parse.unquote(link[1].partition(",")[2]).splitlines()]
    assert [answer["pair"] for answer in saved] == list(range(10))
    assert [answer["choice"] for answer in saved] == choices
    assert [answer["sure"] for answer in saved[:7]] == [True, False, False, True, False, False, True]
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert browser.get_log("browser") == []
