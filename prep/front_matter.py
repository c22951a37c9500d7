"""Drops what is before and after the text of a scanned book: legal notice, stamps, title pages, contents, catalogues.

    drop_front_matter(lines, counts)     the lines of the text

A table of contents is a series of lines that end in leader dots or in growing numbers, a catalogue one of prices and
formats ("1 vol. in-18 ... 3 fr. 50"). Each line is evidence for or against a list, and the list is the series at an end
of the book with the largest sum: a full line of prose counts as much against it as a line with its page number for it, a
short line (a title, a reply, a verse) less. A novel that ends in replies, verse or dated letters keeps them.
"""

import bisect
import itertools
import re
from collections import Counter
from collections.abc import Callable

from rapidfuzz import fuzz

from prep.paragraphs import PAGE_END, full_width


def drop_front_matter(lines: list[str], counts: Counter[str]) -> list[str]:
    """The lines without title pages, stamps, contents and catalogues; page ends stay. Counts the lines dropped, by kind."""
    width = full_width(lines)
    for kind, sign in ("catalogue", _catalogue_sign), ("table_of_contents", _contents_sign):
        for backwards in True, False:  # the back, then the front, each from its outer end
            lines = _drop_list(lines[::-1], width, kind, sign, counts, backwards)
    return _drop_title_pages(_drop_stamps(lines, width, counts), counts)


# --- what digital editions add -------------------------------------------------------------------------

_START = re.compile(
    r"\W*(?:START OF|D[ÉE]BUT D\w+)(?: \w+){0,2}? PROJE(?:CT|T) GUTENBERG|\*END[ *]*THE SMALL PRINT", re.I
)
_END = re.compile(
    r"\W*(?:END OF|FIN D\w+)(?: \w+){0,2}? PROJE(?:CT|T) GUTENBERG|Section 1\. +General Terms of Use and Redistributing",
    re.I,
)
_GUTENBERG = ("gutenberg", "small print", "general terms of use")  # one is in all that these two match
_HEADER = re.compile(
    r".*Project Gutenberg|This eBook is for the use of|(?:Title|Author|Translator|Editor|Illustrator|Release Date|Posting Date"
    r"|(?:Most recently |Last )?Updated|Original publication|Language|Character set encoding) ?:|\W?E(?:Book|text) ?#",
    re.I,
)
# The last page of Wikisource's, Ebooks libres et gratuits' and others' books.
_ABOUT = re.compile(
    r"\W*(?:[ÀA] propos de cette [ée]dition [ée]lectronique|Ce livre num[ée]rique|Une édition|Cet ouvrage est le \d+e publié"
    r"|Merci pour votre lecture|(?:Liste des )?(?:corrections|modifications)|erreurs typographiques corrigées.{0,20}"
    r"|Notes? (?:du|sur la|de) transcri\w+|Transcriber'?s'? notes?)\W*$",
    re.I,
)
_MAKERS = re.compile(
    r"Wikisource|libres? (?:et gratuit|de droits)|bénévoles|numérique romande|électronique du Québec|bibebook|feedbooks"
    r"|atramenta|remplacée?s? par|(?:changed|corrected) to|replaced (?:by|with)",
    re.I,
)
# The first pages of Google, Gallica, the Internet Archive, Bibebook and Feedbooks: their first and their last line.
_FIRST_PAGES = [
    (re.compile(first, re.I), re.compile(last, re.I))
    for first, last in (
        (r"This is a digital copy of a book|Ceci est une copie numérique d'un ouvrage", r".*books\.google"),
        (r"Rappel de votre demande", r".*\d ?%\.?$"),  # its last words: the share of letters that were read well
        (r"Digitized by the Internet Archive", r".*archive\.org/"),
        (r"Une édition$", r"Lire la licence$"),
        (r"Catégorie\(s\) ?:", r"Strictly for personal use, do not"),
    )
]
_EXPORTED = re.compile(
    r"Export[ée]e? de Wikisource le \d.{4,20}$|La Bibliothèque électronique du Québec$|Collection À tous les vents$"
    r"|Volume \d+ : version \d[\d.]*$|BeQ$|Note ?: This book is brought to you by Feedbooks$|Food for the mind$|Publication ?: \d{4}$|Catégorie\(s\) ?: |Source ?: http\S+$|(?:https?://)?www\.(?:feedbooks|ebooksgratuits|bibebook)\.com/?$"
)
_CREDITS = re.compile(
    r"(?:This )?(?:E-?(?:text|book) )?(?:was )?(?:Produced|Prepared|Transcribed|Proofread|Credits|HTML version|Image source|Produit"
    r"|Création de l'e-?text)\b.{0,40}?(?:\bby\b|\bpar\b|:)|\W?Transcriber'?s'? note|\W?Notes? (?:du|sur la|de) transcri"
    r"|We thank the Biblioth",
    re.I,
)


def drop_edition(lines: list[str], counts: Counter[str]) -> list[str]:
    """The lines without Project Gutenberg's header, credits and licence, which its markers prove, and without the page
    about the edition at the end; all lines where there is none."""
    text, first, last = "\n".join(lines).lower(), 0, len(lines)
    starts: list[int] = []
    if any(words in text for words in _GUTENBERG):
        starts = [i for i, line in enumerate(lines) if _START.match(line)]
        first = _after_marker(lines, starts[-1]) if starts else 0
        last = next((i for i in range(first, len(lines)) if _END.match(lines[i])), len(lines))
    if starts or last < len(lines) or any("Project Gutenberg" in line for line in lines[:20]):
        for _ in range(20):  # blocks that may be of the header or credits
            block = next((i for i in range(first, last) if letters_of(lines[i])), last)
            if block == last or not (_CREDITS.match(lines[block]) or _HEADER.match(lines[block])):
                break
            first = _after_block(lines, block)
    for begin, end in _FIRST_PAGES:
        if any(map(begin.match, lines[first : first + 60])):
            first = next((i + 1 for i in range(first, min(first + 200, last)) if end.match(lines[i])), first)
    for i in range(max(first, last - 300), last):
        if _ABOUT.match(lines[i]) and any(map(_MAKERS.search, lines[i : min(i + 20, last)])):
            last = i
            break
    kept = [line for line in lines[first:last] if not _EXPORTED.match(line)]
    if len(kept) < len(lines):
        counts["edition_notes"] += sum(map(_is_text, lines)) - sum(map(_is_text, kept))
    return kept


def _after_block(lines: list[str], index: int) -> int:
    return next((i for i in range(index, len(lines)) if not lines[i]), len(lines))


def _after_marker(lines: list[str], index: int) -> int:
    """After the asterisks that end a marker, which may be on its second line; the text may follow without a blank one."""
    block = range(index, _after_block(lines, index))
    return next((i + 1 for i in block if lines[i].endswith("*")), block.stop)


def letters_of(text: str) -> str:
    """The small letters of a text: what stays when marks, figures and case are misread or differ."""
    return "".join(filter(str.isalpha, text.lower()))


def _is_text(line: str) -> bool:
    return bool(line) and line != PAGE_END


# --- Gallica's legal notice -----------------------------------------------------------------------------------------

# Places all over the notice, which is the same on every scan but wrapped and misread in many ways.
_NOTICE = [
    "les contenus accessibles sur le site gallica sont pour la plupart des reproductions",
    "la réutilisation non commerciale de ces contenus",
    "la réutilisation commerciale de ces contenus est payante",
    "cliquer ici pour accéder aux tarifs et à la licence",
    "les contenus de gallica sont la propriété de la bnf au sens de l'article",
    "quelques contenus sont soumis à un régime de réutilisation particulier",
    "l'utilisateur est invité à s'informer auprès de ces bibliothèques de leurs conditions",
    "gallica constitue une base de données dont la bnf est le producteur",
    "les présentes conditions d'utilisation des contenus de gallica sont régies par la loi française",
    "l'utilisateur s'engage à respecter les présentes conditions d'utilisation",
    "pour obtenir un document de gallica en haute définition contacter",
    "utilisation.commerciale@bnf.fr",
]
_HINT = re.compile("allica|bnf|réutilisa|utilisateur|propriété des personnes", re.I)
_NOTICE_LINES = 150  # nonblank lines at either end that are searched: two pages
_SOURCE = re.compile(
    r"\W*(?:\w{0,8} )?ga[l1i|]{2}ica\W{0,3}bn[fl]\W{0,3}fr\b(?:\W{0,4}biblioth\w+ natio\w+ de \w+)?\W*", re.I
)


def drop_notice(lines: list[str], counts: Counter[str]) -> list[str]:
    """The lines without Gallica's legal pages and without its name on other pages."""
    for at_back in (True, False):
        places = (i for i in range(len(lines))[:: -1 if at_back else 1] if _is_text(lines[i]))
        among = sorted(itertools.islice(places, _NOTICE_LINES))
        if not any(_HINT.search(lines[i]) for i in among):
            continue
        keys = [letters_of(lines[i]) for i in among]
        found = []
        for phrase in map(letters_of, _NOTICE):
            match = fuzz.partial_ratio_alignment(phrase, "".join(keys), score_cutoff=80)
            if match and match.dest_end - match.dest_start > 0.8 * len(phrase):
                found += [match.dest_start, match.dest_end - 1]
        if len(found) < 6:  # three places: a book may quote one
            continue
        ends = list(itertools.accumulate(map(len, keys)))
        first, last = (bisect.bisect_right(ends, place) for place in (min(found), max(found)))
        if not at_back and first <= 40:
            first = 0  # before it is Gallica's cover: the title once more, and the source
        drop = set(among[first : last + 1])
        counts["legal_notice"] += len(drop)
        lines = [line for i, line in enumerate(lines) if i not in drop]
        if at_back and sum(map(_is_text, lines)) < _NOTICE_LINES:
            break  # both ends were the same lines
    kept = []
    for line in lines:  # "Source gallica.bnf.fr / Bibliothèque nationale de France" is on any page
        if "bnf" in line.lower() and _SOURCE.search(line):
            counts["legal_notice"] += 1
            if not (line := _SOURCE.sub(" ", line).strip()):
                continue
        kept.append(line)
    return kept


# --- tables of contents and catalogues ------------------------------------------------------------------------------

_FORMAT = re.compile(
    r"\b[iIÎ][nh][- ]?(?:4|8|12|16|18|32|folio|quarto|octavo)\b|\b\d{1,2} (?:beaux? |gros |forts? )?vol(?:\.|umes?\b)"
)
_PRICE = re.compile(
    r"\b\d{1,3} ?(?:fr?\b\.?|francs?\b)(?: ?\d\d\b)?(?: ?c\b\.?)?\W*$|\b\d{1,3} ?fr\. ?\d\d\b|\b\d\d c\.$"
)
_LEADER = re.compile(r"(?:\. ?|… ?|[_·•] ?|, ?\. ?){4,}\W*\w{0,5}\W*$")
_PAGE_NUMBER = re.compile(r"(?:^|[^\d-])(\d{1,3}|[1-9]\d{3})[^\w)]{0,3}$")
_YEAR = re.compile(r"\b1[5-9]\d\d\W*$")
_DATED = re.compile(r"\d{1,2}(?:er)? [a-zéû]{3,9}\.? \d{2,4}\W*$|\b(?:heures?|ans|jours?|n°) *\d+\W*$")
_HEADING = re.compile(r"\W{0,3}(?:TABLE|INDEX|SOMMAIRE|Table des (?:mati|chap))\b", re.U)
_END_OF_WORK = re.compile(r"\W*(?:FIN|Fin)\b.{0,40}$")

_SHORT = -0.25  # evidence of a line without any sign that is not full
_GIVE_UP = 20.0  # so far below its best the sum is in prose: thirty lines of a page
_WIDEST = 120  # characters in a line of a page; what is longer is a paragraph
_ENOUGH = 3.0  # the smallest sum of a list, and the fewest certain signs in it


def _catalogue_sign(line: str) -> float:
    if _FORMAT.search(line) or _PRICE.search(line):
        return 1.0
    return 0.5 if _leads(line) else 0.0


def _leads(line: str) -> bool:
    """Whether leader dots run from words to the line's end; dots alone are a gap in a text."""
    return any(map(str.isalpha, line)) and line[-1] not in "!?»" and bool(_LEADER.search(line))


def _contents_sign(line: str) -> float:
    if _HEADING.match(line) and len(line) < 40:
        return 2.0
    return float(_leads(line) or bool(_PAGE_NUMBER.search(line) and not _YEAR.search(line) and not _DATED.search(line)))


def _drop_list(
    lines: list[str], width: int, kind: str, sign: Callable[[str], float], counts: Counter[str], backwards: bool
) -> list[str]:
    """The lines without the list at their beginning, if there is one; `backwards`: they come last line first."""
    best = total = 0.0
    start = first = last = -1
    signs = found = seen = 0
    for i, line in enumerate(lines):
        if not _is_text(line):
            continue
        seen += 1
        weight = sign(line) if len(line) <= _WIDEST else 0.0
        signs += weight >= 1
        if not weight:
            full = len(line) >= 0.75 * width and sum(map(str.islower, line)) > 0.6 * len(line)
            weight = -1.0 if full else _SHORT
        if not backwards and total + weight <= 0 and best < _ENOUGH:
            total, start, signs = 0.0, -1, 0  # at the front a list may follow titles, which are no part of it
            if seen > 400:
                break
            continue
        if start < 0:
            start = i
        total += weight
        if total > best and weight > 0:
            best, first, last, found = total, start, i, signs
        if total < best - _GIVE_UP:
            break
    if best < _ENOUGH or found < _ENOUGH:
        return lines
    block = lines[first : last + 1]
    if sum(map(bool, block)) > sum(map(bool, lines)) / 4:  # a work that is a list
        return lines
    if kind == "table_of_contents" and not _grows(block[::-1] if backwards else block):
        return lines
    if backwards:
        first, last = 0, _head(lines, last, width)
    kept = [line for i, line in enumerate(lines) if not (_is_text(line) and first <= i <= last)]
    counts[kind] += len(lines) - len(kept)
    return kept


def _grows(block: list[str]) -> bool:
    """Whether the numbers at the lines' ends grow, as those of pages do, apart from misread ones."""
    numbers = [int(match[1]) for line in block if (match := _PAGE_NUMBER.search(line))]
    if len(numbers) < 3:
        return any(_HEADING.match(line) for line in block)
    return sum(a < b for a, b in itertools.pairwise(numbers)) >= 0.6 * (len(numbers) - 1)


def _head(lines: list[str], last: int, width: int) -> int:
    """Where a list found backwards begins: its heading or the page's beginning, since its first lines may have no sign."""
    for i in range(last + 1, min(last + 40, len(lines))):
        line = lines[i]
        if line == PAGE_END or (line and _HEADING.match(line) and len(line) < 0.6 * width):
            return i
        if line and (_END_OF_WORK.match(line) or len(line) >= 0.6 * width):
            break
    return last


# --- stamps and title pages -----------------------------------------------------------------------------------------

_TITLE_PAGES = 40  # at most so many before the text; library scans begin with empty leaves and colour charts
_WORDS = re.compile(r"\b[a-zà-öø-ÿœ]{2,}\b")
_STAMP = re.compile(
    r"(?i:\b(?:bibl[il]oth[eéèêë][qg]ue|bibl\.) ?(?:nat|imp|roy|mun|de|du|la|sainte)|\bd[ée]p[oôéòó0]t ?l[ée]gal)"
    r"|^\W*(?:B\. ?[NIR]\.|R\. ?F\.|DON\b.{0,12}|IMPRIM[ÉE]S?|ESTAMPES|ACQUISITIONS?.{0,12}|BIBLIOTH\S*|NATIONALE)\W*$"
)


def _drop_title_pages(lines: list[str], counts: Counter[str]) -> list[str]:
    """Without the pages before the text (covers, titles): those with fewer than three lines of words."""
    first = 0
    for end in [i for i, line in enumerate(lines[:2000]) if line == PAGE_END][:_TITLE_PAGES]:
        if sum(len(_WORDS.findall(line)) >= 4 for line in lines[first:end]) >= 3:
            break
        first = end + 1
    else:
        return lines  # no text anywhere: these are no pages before a text
    counts["title_page"] += sum(map(_is_text, lines[:first]))
    return lines[first:]


def _drop_stamps(lines: list[str], width: int, counts: Counter[str]) -> list[str]:
    """Without the library's stamps: short lines that name a library, before the first full lines of prose."""
    run = seen = 0
    kept: list[str] = []
    for i, line in enumerate(lines):
        if _is_text(line):
            seen += 1
            run = run + 1 if len(line) >= 0.75 * width and any(map(str.islower, line)) else 0
            if run == 4 or seen > 200:
                return kept + lines[i:]
            if len(line) < min(60, max(30, 0.75 * width)) and _STAMP.search(line):
                counts["library_stamps"] += 1
                continue
        kept.append(line)
    return kept
