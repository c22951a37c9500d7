"""What a work is, whichever edition: the key that puts all its editions on one side, and which side that is."""

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable


def fraction(*parts: object) -> float:
    """A number in [0, 1) that hangs on the parts alone: a draw that needs neither order nor memory."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


_VOLUME = re.compile(
    r"\b(?:tome|tom|t|volume|vol|v|partie|part|livre|serie)\b *(?:\d+|[ivxlc]+)\b.*|\b(?:\d+|[ivxlc]+)$"
)
_SUBTITLE = re.compile(
    r"[:;/(\[=]|, *(?=(?:roman|nouvelle|conte|recit|histoire|etude|poe[ms]|drame|comedie|souvenir|moeurs))"
)
_ARTICLE = re.compile(r"^(?:le|la|les|l|un|une|des|du|de|d) ")


def work_of(title: str, source: str) -> str:
    """The work a book is an edition of: its title without subtitle, volume, article, accents and case.

    The author is left out on purpose. Editions spell him in many ways or not at all, and to put the works of two
    authors that bear one title on the same side costs nothing, while one edition on either side is a leak.
    A book without title stands for itself.
    """
    letters = unicodedata.normalize("NFKD", title.casefold().replace("œ", "oe").replace("æ", "ae"))
    letters = "".join(c for c in letters if not unicodedata.combining(c))
    main = _SUBTITLE.split(letters, maxsplit=1)[0]
    for candidate in (main, letters):
        words = re.sub(r"[^a-z0-9]+", " ", candidate).strip()
        work = _ARTICLE.sub("", _VOLUME.sub("", words).strip()) or words
        if work:
            return work
    return source


class HeldOut:
    """Decides which works are held out: those whose hash falls into the first `share` of all hashes.

    Neither seed nor corpus enters, so that every stage holds out the same works. Only where no work of the corpus
    falls there (a few dozen books), the one that comes nearest is held out.
    """

    def __init__(self, share: float, works: Iterable[str]):
        nearest = min((fraction("held out", work) for work in works), default=0.0)
        self.limit = 0.0 if share == 0 else max(share, math.nextafter(nearest, 1))

    def __call__(self, work: str) -> bool:
        return fraction("held out", work) < self.limit
