"""From lines to paragraphs: every kind of noise goes, what only looks like it stays. Scored on a corpus if there is one."""

import itertools
import os
import random
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_tokenizers import tales

from bench.score_cleaning import Score, documents, paragraphs_of, score
from prep.page_layout import clean_pages
from prep.paragraphs import hyphen_stays
from prep.typography import to_convention

TITLE = "LA MAISON DU PASSEUR"


@pytest.fixture(scope="module")
def novel() -> list[str]:
    """Paragraphs of two tales, in the convention; no figure in them, so that every figure left is a page's."""
    paragraphs = [p for tale in tales()[:2] for p in paragraphs_of(tale)]
    assert len(paragraphs) > 80
    return paragraphs


def pages(paragraphs: list[str], width: int = 60, lines: int = 30) -> Iterator[list[str]]:
    """The lines of each page."""
    every = [line for p in paragraphs for line in textwrap.wrap(p, width, break_on_hyphens=False)]
    for start in range(0, len(every), lines):
        yield every[start : start + lines]


def roman(number: int) -> str:
    return "x" * (number // 10) + ["", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix"][number % 10]


def misread(title: str, number: int) -> str:
    """A running header as a scan reads it: one letter wrong on every other page."""
    draw = random.Random(number)
    at = draw.randrange(len(title))
    return title if number % 2 else title[:at] + draw.choice("BRO0.") + title[at + 1 :]


EDGES: dict[str, Callable[[int], list[str]]] = {
    "en dashes": lambda n: [f"– {n} –"],
    "hyphens": lambda n: [f"- {n} -"],
    "em dashes": lambda n: [f"— {n} —"],
    "brackets": lambda n: [f"[{n}]"],
    "bare": lambda n: [f"{n}"],
    "point": lambda n: [f"{n}."],
    "roman": lambda n: [roman(n)],
    "header and number": lambda n: [f"{n} {TITLE}."] if n % 2 else [f"{TITLE}. {n}"],
    "header above number": lambda n: [TITLE, f"{n}"],
    "header misread": lambda n: [f"{n} {misread(TITLE, n)}"],
    "two headers, no number": lambda n: [TITLE if n % 2 else "LE VILLAGE D'EN BAS"],
    "now and then unnumbered": lambda n: [f"– {n} –"] if n % 7 else [],
}


NOTICE = """\
Source gallica.bnf.fr / Bibliothèque nationale de France
1/ Les contenvs accessibles sur le site Gallica sont pour la plupart
des reproductions numériqnes d'oeuvres tombées dans le domaine public.
- La réutilisation non commercia1e de ces contenus est libre
2/ Les contenus de Gallica sont 1a propriété de la BnF au sens de l'article
6/ L'utilisatcur s'engage à respecter les présentes conditions d'utilisation
7/ Pour obtenir un docunent de Gallica en haute définition, contacter
utilisation.commerciale@ bnf.fr."""
CONTENTS = "\n".join(
    ["TABLE DES MATIÈRES", *(f"{roman(n).upper()}. — Le bac et la grille. . . . . {7 * n}" for n in range(1, 15))]
)
CATALOGUE = "\n".join(f"La Grille rouge, {n}e édition. 1 vol. in-18 ... 3 fr. 50" for n in range(1, 12))


@pytest.mark.parametrize("between", ["", "\n", "\f"], ids=["no gap", "blank lines", "form feeds"])
@pytest.mark.parametrize("kind", EDGES)
def test_page_numbers_and_running_headers_go_and_nothing_else(novel, kind, between):
    if kind == "two headers, no number" and between != "\f":
        pytest.skip("nothing shows that this text has pages")
    sheets = list(pages(novel))
    text = "".join("\n".join([*EDGES[kind](number), *lines]) + f"\n{between}" for number, lines in enumerate(sheets, 5))
    found = clean_pages(text)
    assert " ".join(found.paragraphs) == " ".join(novel)
    numbers = sum(any(map(str.isdigit, "".join(EDGES[kind](n)))) or kind == "roman" for n in range(5, len(sheets) + 5))
    assert found.counts.get("page_numbers", 0) == numbers
    assert score(found.paragraphs, novel).f1 > 0.96


def test_what_only_looks_like_a_page_number_or_a_header_stays(novel):
    """Chapter numerals, a year alone in its line, a reply that often comes first on its page, figures in sentences."""
    chapters = []
    for number, start in enumerate(range(0, len(novel), 12), 1):
        chapters += [roman(number).upper(), f"Ils étaient {number + 40} devant la porte.", *novel[start : start + 12]]
        chapters += ["— Non, dit-il.", f"{1800 + number}", "On compta les maisons :", f"{number} rue du Bac."]
    sheets = list(pages(chapters, lines=20))
    for lines in sheets[3::4]:
        lines.insert(0, "— Jamais !")
    text = "\n".join("\n".join([*lines, f"– {number} –"]) for number, lines in enumerate(sheets, 5))
    found = clean_pages(text)
    assert " ".join(found.paragraphs) == " ".join(itertools.chain.from_iterable(sheets))
    assert found.counts["page_numbers"] == len(sheets) and "running_headers" not in found.counts


def test_chapter_numerals_are_not_taken_for_page_numbers_where_pages_have_none(novel):
    plain = [p for p in novel if len(p) > 5]
    chapters = [text for n in range(6) for text in (roman(n + 1).upper(), *plain[10 * n : 10 * n + 10])]
    found = clean_pages("\n".join(line for page in pages(chapters) for line in page))
    assert [p for p in found.paragraphs if len(p) <= 5] == ["I", "II", "III", "IV", "V", "VI"]
    assert "page_numbers" not in found.counts


def test_missing_text_goes_and_the_sentence_goes_on():
    text = "La barque passa si vite \n[texte_manquant] \nsous le pont neuf qu'elle ne \nrevint pas. \nOn l'attendit [texte_manquant] longtemps. \n"
    found = clean_pages(text)
    assert found.paragraphs == [
        "La barque passa si vite sous le pont neuf qu'elle ne revint pas.",
        "On l'attendit longtemps.",
    ]
    assert found.counts["missing_text"] == 2


@pytest.mark.parametrize(
    ("head", "tail", "elsewhere", "stays"),
    [
        ("bois", "son", "", False),
        ("vous", "même", "vous êtes le même", True),
        ("moi", "même", "ne dis rien à moi ni au même homme", True),
        ("dit", "il", "", True),
        ("va", "t-il", "", True),
        ("va-t", "on", "", True),
        ("fi", "dèle", "", False),
        ("vil", "le", "le soir", False),
        ("peut", "être", "cela peut être vrai", True),
        ("peut-ê", "tre", "peut-être", False),
        ("est-à", "dire", "", True),
        ("rez", "de-chaussée", "", True),
        ("celui", "ci", "", True),
        ("par", "dessus", "", True),
        ("Saint", "Aubin", "", True),
        ("CHA", "PITRE", "", False),
        ("porte", "manteau", "le porte-manteau", True),  # the book writes it so
        ("porte", "manteau", "le portemanteau", False),
        ("arc-en", "ciel", "", True),
        ("cha", "peau", "", False),
    ],
)
def test_a_hyphen_stays_where_the_word_demands_it(head, tail, elsewhere, stays):
    assert hyphen_stays(head, tail, Counter(elsewhere.lower().split())) is stays


def test_hyphens_at_line_and_page_ends(novel):
    lines = ["Le vieux passeur s'assit sur le banc avec son com-", "pagnon de toujours et lui dit qu'il viendrait lui-"]
    rest = [
        "même ouvrir la grille du jardin, puisque Saint-",
        "Aubin était loin et que les hors-",
        "d'œuvre attendaient.",
    ]
    text = "\n".join([*lines, "\f– 12 –", *rest])
    found = clean_pages(text)
    assert found.paragraphs == [
        "Le vieux passeur s'assit sur le banc avec son compagnon de toujours et lui dit qu'il viendrait lui-même ouvrir "
        "la grille du jardin, puisque Saint-Aubin était loin et que les hors-d'œuvre attendaient."
    ]
    assert found.counts == {"hyphens_joined": 1, "hyphens_kept": 3, "page_breaks_joined": 1, "page_numbers": 1}


def test_a_words_own_halves_are_no_evidence_for_a_hyphen():
    """Only the cut itself makes a word of "tremb": the "la" elsewhere must not turn it into a verb and its pronoun."""
    found = clean_pages("Quand la porte s'ouvrit enfin, toute la maison tremb-\nla, et la servante se mit à rire.")
    assert found.paragraphs == ["Quand la porte s'ouvrit enfin, toute la maison trembla, et la servante se mit à rire."]


@pytest.mark.parametrize("widths", [[62], [52, 58, 61], [44]], ids=str)
def test_paragraphs_are_found_where_only_short_last_lines_tell(novel, widths):
    """One width for the book, or one for each paragraph; full last lines are what cannot be seen."""
    draw = random.Random(3)
    lines = [line for p in novel for line in textwrap.wrap(p, draw.choice(widths), break_on_hyphens=False)]
    result = score(clean_pages("\n".join(lines)).paragraphs, novel)
    assert result.errors == 0
    assert result.f1 > 0.97 and result.precision > 0.97


def test_uneven_lines_of_a_proportional_type(novel):
    """In print a full line has 56 to 64 characters, as the letters happen to be narrow or wide."""
    draw = random.Random(4)
    lines = []
    for paragraph in novel:
        words = paragraph.split()
        while words:
            room, line = draw.randint(56, 64), words.pop(0)
            while words and len(line) + 1 + len(words[0]) <= room:
                line += f" {words.pop(0)}"
            lines.append(line)
    result = score(clean_pages("\n".join(lines)).paragraphs, novel)
    assert result.errors == 0 and result.f1 > 0.95


def test_dialogue_begins_a_paragraph_and_a_dash_in_mid_sentence_does_not():
    text = """\
Le passeur posa sa rame contre le mur, il regarda le ciel
– un ciel bas, couleur d’étain, qui ne promettait rien de bon
– et il se mit à rire doucement. Personne ne lui répondit.
– Vous riez ? dit la servante.
– Je ris, dit-il, parce que la rivière monte, et que le maire
– vous le connaissez – a encore perdu son chapeau dans le bac.
– Alors passez-nous vite."""
    assert clean_pages(text).paragraphs == [
        "Le passeur posa sa rame contre le mur, il regarda le ciel — un ciel bas, couleur d'étain, qui ne promettait rien "
        "de bon — et il se mit à rire doucement. Personne ne lui répondit.",
        "— Vous riez ? dit la servante.",
        "— Je ris, dit-il, parce que la rivière monte, et que le maire — vous le connaissez — a encore perdu son chapeau "
        "dans le bac.",
        "— Alors passez-nous vite.",
    ]


def short_lines(novel: list[str]) -> list[str]:
    return [line for p in novel for line in (p, draw_line(len(p)))]


def draw_line(n: int) -> str:
    return ("« Oui. »", "Adieu, mon ami.", "— Jamais !", "Le marquis de ***")[n % 4]


def verses(paragraph: str) -> list[str]:
    return [line[0].upper() + line[1:] for line in textwrap.wrap(paragraph, 38, break_on_hyphens=False)[:8]]


WITHOUT_PAGES: dict[str, Callable[[list[str]], list[str]]] = {
    "short lines that recur": short_lines,
    "chapters": lambda novel: [line for n, p in enumerate(novel, 1) for line in (f"Chapitre {n}", p)],
    "chapters in figures": lambda novel: [line for n, p in enumerate(novel, 1) for line in (f"{n}", p, p)],
    "letters": lambda novel: [line for n, p in enumerate(novel, 1) for line in (f"LETTRE {n}", p, "Ton amie C")],
    "a play": lambda novel: [
        line for n, p in enumerate(novel) for line in (["ORGON", "DORINE"][n % 2], " ".join(p.split()[:9]))
    ],
    "verse": lambda novel: [line for n, p in enumerate(novel, 1) for line in (f"{n}", *verses(p))],
    "a table of contents": lambda novel: [*novel, *CONTENTS.split("\n")],
    "a catalogue": lambda novel: [*CATALOGUE.split("\n"), *novel],
}


@pytest.mark.parametrize("form", ["blank lines", "blank lines, wrapped", "lines", "lines, wrapped"])
@pytest.mark.parametrize("kind", WITHOUT_PAGES)
def test_of_a_text_without_pages_every_word_stays_in_its_order(novel, kind, form):
    paragraphs = [to_convention(line) for line in WITHOUT_PAGES[kind](novel)]
    lines = [textwrap.fill(p, 66, break_on_hyphens=False) for p in paragraphs] if "wrapped" in form else paragraphs
    found = clean_pages(("\r\n\r\n" if "blank" in form else "\n").join(lines)).paragraphs
    assert " ".join(found).split() == " ".join(paragraphs).split()
    if form == "blank lines":
        assert found == paragraphs
    again = clean_pages("\n\n".join(found) + "\n").paragraphs
    assert again == found


def test_replies_between_blank_lines_stay_where_pages_are_numbered(novel):
    """Only lines that recur at the edges of pages are headers, not every line beside a blank line."""
    lines = [line for p in short_lines(novel) for line in [*textwrap.wrap(p, 60, break_on_hyphens=False), ""]]
    sheets = [lines[start : start + 40] for start in range(0, len(lines), 40)]
    text = "\n".join("\n".join([f"{n} {TITLE}", *sheet]) for n, sheet in enumerate(sheets, 5))
    found = clean_pages(text)
    assert " ".join(found.paragraphs).split() == " ".join(map(to_convention, short_lines(novel))).split()
    assert found.counts["running_headers"] == len(sheets)


def test_blank_lines_divide_a_plain_text(novel):
    text = "\r\n\r\n".join(textwrap.fill(p, 70, break_on_hyphens=False).replace("\n", "\r\n") for p in novel)
    assert clean_pages(text).paragraphs == novel


def test_a_line_a_paragraph_stays_one(novel):
    assert clean_pages("\n".join(novel)).paragraphs == novel


def test_title_page_goes_with_the_header_that_repeats_it(novel):
    title = f" \n{TITLE}\n \nPAR DELORME \n \nPARIS \nBIBLIOTHÈQUE NATIONALE \n \n"
    body = "\n \n".join("\n".join([f"{n} {TITLE}. ", *lines]) for n, lines in enumerate(pages(novel), 6))
    found = clean_pages(title + body)
    assert " ".join(found.paragraphs) == " ".join(novel)
    assert found.counts["title_page"] == 2 and found.counts["library_stamps"] == 1


@pytest.mark.parametrize(
    ("front", "back", "kind"),
    [
        (NOTICE, "", "legal_notice"),
        ("DÉPÔT LÉGAL\nSeine\nBIBLIOTHÈQUE IMPÉRIALE", "", "library_stamps"),
        ("", CONTENTS, "table_of_contents"),
        (CONTENTS, "", "table_of_contents"),
        ("", CATALOGUE, "catalogue"),
        (CATALOGUE, "", "catalogue"),
    ],
    ids=["notice", "stamps", "contents behind", "contents before", "catalogue behind", "catalogue before"],
)
def test_what_stands_before_and_after_the_work_goes(novel, front, back, kind):
    body = "\f".join("\n".join(sheet) for sheet in pages(novel))
    found = clean_pages("\n\n".join([front, body, back]))
    text = " ".join(found.paragraphs)
    assert text.replace("Seine ", "") == " ".join(novel)
    assert found.counts[kind] >= len((front or back).splitlines()) - 1


@pytest.mark.parametrize(
    "end",
    [
        ["— Oui.", "— Non.", "— Jamais !", "— Alors ?"] * 8,
        ["La rivière descend,", "Le passeur la regarde,", "Il n'est plus temps."] * 8,
        [f"Au bac, le {n} mai 1870" for n in range(3, 20)],
        [". . . . . . . . . . . . . ."] * 8,
        [f"Il avait compté les maisons du village. ({n})" for n in range(3, 20)],
        ["Il paya le passage 3 fr.", "On rit.", "Le livre était un in-18.", "Personne ne répondit."],
    ],
    ids=["replies", "verse", "dates", "dots", "numbers in brackets", "a price"],
)
def test_an_end_that_only_looks_like_a_list_stays(novel, end):
    found = clean_pages("\n".join([*novel, *end]))
    assert not {"catalogue", "table_of_contents", "legal_notice"} & found.counts.keys()
    assert len(" ".join(found.paragraphs)) > len(" ".join(novel))


def test_sheet_numbers_and_blots_at_a_pages_foot_go_and_title_pages_before_the_text(novel):
    novel = novel[10:70]  # after the heads of the tale, which stand in lines of their own
    sheets = [["BAC", "1870"], *pages(novel)]
    text = "\f".join("\n".join([*lines, *(["4 |"] if n % 3 == 2 else [])]) for n, lines in enumerate(sheets))
    found = clean_pages(text)
    assert " ".join(found.paragraphs) == " ".join(novel)
    assert found.counts["page_marks"] == sum(n % 3 == 2 for n in range(len(sheets)))
    assert found.counts["title_page"] == 2


def test_a_pages_own_number_tells_a_header_that_was_read_as_rubbish(novel):
    """Numbers between blots at a page's edge, where the pages around say that it is this page's; others stay."""
    rubbish = {206: "1A ma50m du p4 206 %", 208: f"- 308 {TITLE}", 209: "209 ES rn", 210: "Rm | 210 :", 214: "274"}
    sheets = list(pages(novel[10:70], lines=12))
    assert len(sheets) > 12
    sheets[7].insert(0, "Vers 1870, au 223 du quai,")  # page 212
    sheets[10].append("et 3 ou 4 autres.")
    raw = "\f".join("\n".join([rubbish.get(n, f"{n} {TITLE}"), *lines]) for n, lines in enumerate(sheets, 205))
    found = clean_pages(raw)
    assert " ".join(found.paragraphs) == " ".join(itertools.chain.from_iterable(sheets))
    assert found.counts["page_numbers"] == len(sheets) - 1  # a dash before it, and it is a header that has one
    for mine, another in (("p4 206", "p4 216"), ("\f274", "\f259")):
        assert another.strip() in " ".join(clean_pages(raw.replace(mine, another)).paragraphs)


@pytest.mark.parametrize("marker", ["THIS", "THE"])
def test_project_gutenbergs_header_credits_and_licence_go(novel, marker):
    header = (
        f"The Project Gutenberg EBook of Un conte\n\nTitle: Un conte\n\n*** START OF {marker} PROJECT GUTENBERG EBOOK"
    )
    credits = "Produced by a volunteer and the\nDistributed Proofreaders"
    end = (
        f"End of Project Gutenberg's Un conte\n\n*** END OF {marker} PROJECT GUTENBERG EBOOK ***\n\nSection 1. Licence."
    )
    found = clean_pages("\n\n".join([f"{header} UN\nCONTE ***", credits, *novel, end]))
    assert found.paragraphs == novel
    assert clean_pages("\n\n".join([credits, *novel])).paragraphs[-1] == novel[-1]


def test_empty_and_tiny_texts():
    assert clean_pages("").paragraphs == []
    assert clean_pages(" \n\f\n \n").paragraphs == []
    assert clean_pages("12").paragraphs == ["12"]
    assert clean_pages("– Oui.").paragraphs == ["— Oui."]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("L’âme d’un soldat&nbsp;: &laquo;l'été&raquo;", "L'âme d'un soldat : « l'été »"),
        ("e\u0301te\u0301, cœur, ﬁn", "été, cœur, fin"),
        ("Vraiment?dit-il;oui!", "Vraiment ? dit-il ; oui !"),
        ("Vraiment\u202f? oui\u00a0!!", "Vraiment ? oui !!"),
        ("–Bonjour, dit—il.", "— Bonjour, dit-il."),
        ("- Oui.", "— Oui."),
        ("— - Mais oui.", "— Mais oui."),
        ("-même, dit-il", "-même, dit-il"),
        ("Il vint - sans bruit - , puis -- partit--enfin .", "Il vint — sans bruit —, puis — partit — enfin."),
        ("Paris–Lyon, 1914–1918, 10 - 12", "Paris-Lyon, 1914-1918, 10 - 12"),
        ("J. -J. Rousseau", "J. -J. Rousseau"),
        ("il est 12:30, voir http://exemple.fr/a?b", "il est 12:30, voir http://exemple.fr/a ? b"),
        ('"Oui", dit-il, "non."', "« Oui », dit-il, « non. »"),
        ("“Oui” dit l'«ami».", "« Oui » dit l'« ami »."),
        ("fin. . . . et encore…", "fin... et encore..."),
        ("( entre nous )", "(entre nous)"),
        ("» Vous", "» Vous"),
        ("so\u00adleil\u200b", "soleil"),
        ("un\n- Deux\n–Trois", "un\n— Deux\n— Trois"),
    ],
)
def test_typographic_convention(raw, expected):
    assert to_convention(raw) == expected
    assert to_convention(expected) == expected


def test_convention_applied_twice_is_applied_once():
    for tale in tales():
        once = to_convention(tale)
        assert to_convention(once) == once


def test_score_counts_what_is_wrong():
    truth = ["Un deux trois.", "Quatre cinq.", "Six sept huit."]
    assert score(truth, truth) == Score(42, 0, 2, 2, 2, 0, 0, 0)
    merged = score(["Un deux trois. Quatre cinq.", "Six sept", "huit."], truth)
    assert (merged.errors, merged.found_boundaries, merged.right_boundaries) == (0, 2, 1)
    left = score(["Un deux – 12 – trois.", "Quatre cinq.", "LA MAISON Six sept huit."], truth)
    assert (left.numbers_left, left.headers_left, left.right_boundaries) == (1, 1, 2)
    assert left.errors == len("– 12 – ") + len("LA MAISON ")
    assert score(["Un deux tr-ois."], ["Un deux trois."]).hyphen_errors == 1


CORPUS = os.environ.get("CORPUS_DIR")


@pytest.mark.skipif(not CORPUS, reason="CORPUS_DIR is not set: a folder with gallica/ (parquet files and truth/)")
def test_cleaning_of_gallica_pages_against_truth():
    folder = Path(CORPUS or "") / "gallica"
    results = [
        score(clean_pages(raw).paragraphs, paragraphs_of(truth))
        for _, raw, truth in documents(folder, folder / "truth")
    ]
    total = sum(results[1:], results[0])
    print(f"\n{len(results)} books: {total}")
    assert len(results) >= 40
    assert total.error_rate <= 0.005
    assert total.f1 >= 0.97 and min(result.f1 for result in results) > 0.9
    assert (
        total.hyphen_errors <= 0.01 * sum(map(lambda r: r.characters, results)) / 3000
    )  # one cut word in 3,000 characters
    # What is counted as left over is mostly a difference in the truths themselves: a few places in 13,000 pages.
    assert total.numbers_left + total.headers_left <= 10
