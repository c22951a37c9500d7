"""Texts in every encoding that French files come in, and those that must be refused."""

import quopri
import unicodedata

import pytest
from small_tokenizers import tales

from prep.common import BadInput
from prep.encodings import LEGACY
from prep.formats import read_bytes


def read(data: bytes) -> str:
    return read_bytes(data, "conte.txt").text


TALE = tales()[0].replace("'", "’").replace("—", "–")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", *LEGACY])
def test_a_text_comes_back_from_every_encoding(encoding):
    text = TALE.encode(encoding, "ignore").decode(encoding)
    assert read(text.encode(encoding)) == text


def test_a_file_cut_in_a_character_or_never_written_to_its_end_is_read():
    for encoding in ("utf-8", "utf-16"):
        assert read(f"{TALE}é".encode(encoding)[:-1]) == TALE, encoding
    assert read(f"{TALE}\0\0\0".encode() + bytes(500)) == TALE
    assert read("Il est né".encode("cp1252")) == "Il est né"
    assert read(f"{TALE}\ufffd".encode()) == TALE  # a lone one


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        *(("utf-8", wrong) for wrong in ("latin-1", "cp1252", "mac_roman", "cp850")),
        *(("cp1252", wrong) for wrong in ("latin-1", "mac_roman", "cp850")),
        *(("mac_roman", "latin-1"), ("mac_roman", "cp850"), ("cp850", "latin-1"), ("cp850", "mac_roman")),
    ],
)
def test_a_text_read_in_a_wrong_encoding_comes_back(right, wrong):
    text = f"{TALE} Señor !".encode(right, "ignore").decode(right)
    assert read(text.encode(right).decode(wrong).encode()) == text


def test_a_file_in_two_encodings_is_read_in_both():
    text = TALE.encode("cp1252", "ignore").decode("cp1252")
    assert read(f"{text}\n{text.encode().decode('cp1252', 'ignore')}".encode()) == f"{text}\n{text}"
    text += " “Oui.”"  # CP1252 has no character for the last byte of ” in UTF-8
    assert read(text.encode() + b"\n" + text.encode("cp1252")) == f"{text}\n{text}"


def test_the_oe_that_latin1_has_not_comes_back_in_words_that_are_french_only_so():
    for sign in "?½":
        raw = f"Son c{sign}ur, les m{sign}urs, l'{sign}uvre, une man{sign}uvre. Vraiment?Il vint ?il vit qu?il part"
        assert read(raw.encode()) == "Son cœur, les mœurs, l'œuvre, une manœuvre. Vraiment?Il vint ?il vit qu?il part"
    assert read("L'¼uvre, l'½il, LES M?URS".encode()) == "L'Œuvre, l'œil, LES MŒURS"


ASCII = TALE.encode("ascii", "replace")


LOST = {
    "U+FFFD": (ASCII.replace(b"?", "\ufffd".encode()), "letters .they are U.FFFD"),
    "question marks": (ASCII, "question marks"),
    "a mail": (quopri.encodestring(TALE.encode()), "codes such as"),
    "TeX": (TALE.replace("é", r"\'e").encode(), "codes such as"),
    "HTML": (TALE.replace("é", "&eacute").encode(), "codes such as"),
    "without accents": (unicodedata.normalize("NFD", TALE).encode("ascii", "ignore"), "without accents"),
    "UTF-32 without a mark": (TALE.encode("utf-32-le"), "neither a PDF nor a text"),
    "UTF-16 that is none": (b"\xff\xfe" + b"\0\xd8" * 99, "neither a PDF nor a text"),
    "EBCDIC": (TALE.encode("cp037", "ignore"), "(encoding|UTF-8)"),
    "Cyrillic": ("К. открыл дверь, и никто не ответил ему.".encode("cp1251"), "in no other encoding is it French"),
}


@pytest.mark.parametrize(("data", "message"), LOST.values(), ids=LOST)
def test_what_has_lost_its_letters_or_cannot_be_read_for_certain_is_refused(data, message):
    with pytest.raises(BadInput, match=f"conte.txt .*{message}"):
        read(data)
