"""Texts in every encoding that French files come in, and those that must be refused."""

import quopri
import random
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
    text = "".join(c for c in TALE if c.encode(encoding, "ignore").decode(encoding))
    assert read(text.encode(encoding)) == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_file_cut_in_a_character_or_never_written_to_its_end_is_read(encoding):
    data = f"{TALE}é".encode(encoding)[:-1]
    assert read(data) == TALE
    assert read(f"{TALE}\0\0\0".encode() + bytes(500)) == TALE
    assert read("Il est né".encode("cp1252")) == "Il est né"


@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_utf8_encoded_twice_and_cp1252_taken_for_latin1_are_repaired(wrong):
    text = (
        TALE.replace("à", "a").replace("À", "A").replace("Œ", "OE")
    )  # a0 and 9d are no characters of CP1252 everywhere
    assert read(text.encode().decode(wrong).encode()) == text
    text = TALE.encode("cp1252", "ignore").decode("cp1252")
    assert read(text.encode("cp1252").decode("latin-1").encode()) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TALE.encode("ascii", "replace").replace(b"?", "\ufffd".encode()), "has lost"),
        (TALE.encode("cp037", "ignore"), "encoding|UTF-8"),
        (random.Random(1).randbytes(5000), "UTF-8"),
        ("К. открыл дверь, и никто не ответил ему.".encode("cp1251"), "French"),
    ],
    ids=["replacement characters", "EBCDIC", "binary", "Cyrillic"],
)
def test_what_cannot_be_read_for_certain_is_refused_by_name(data, message):
    with pytest.raises(BadInput, match=f"conte.txt .*({message})"):
        read(data)


def test_a_lone_replacement_character_is_not_written():
    assert read(f"{TALE}\ufffd".encode()) == TALE


@pytest.mark.parametrize("wrong", ["latin-1", "mac_roman", "cp850"])
@pytest.mark.parametrize("right", ["utf-8", "cp1252", "mac_roman", "cp850"])
def test_a_text_read_in_a_wrong_encoding_comes_back(right, wrong):
    text = "".join(c for c in TALE if c.encode(right, "ignore").decode(right) and c.encode("cp850", "ignore"))
    assert read(text.encode(right).decode(wrong).encode()) == text


def test_a_file_in_two_encodings_is_read_in_both():
    text = TALE.encode("cp1252", "ignore").decode("cp1252")
    for half in (text.encode("cp1252"), text.encode().decode("cp1252", "ignore").encode()):
        assert read(text.encode() + b"\n" + half) == f"{text}\n{text}"


def test_the_oe_that_latin1_has_not_comes_back_in_words_that_are_french_only_so():
    for sign in "?½":
        raw = "Son c?ur, les m?urs, l'?uvre, une man?uvre. Vraiment?Il vint ?il vit qu?il part".replace("?", sign)
        raw = raw.replace(f"Vraiment{sign}", "Vraiment?").replace(f" {sign}il", " ?il").replace(f"qu{sign}", "qu?")
        assert read(raw.encode()) == "Son cœur, les mœurs, l'œuvre, une manœuvre. Vraiment?Il vint ?il vit qu?il part"


ASCII = TALE.encode("ascii", "replace")
LOST = {
    "question marks": ASCII,
    "codes": quopri.encodestring(TALE.encode()),
    "codes such": TALE.replace("é", r"\'e").encode(),
    "codes such as": TALE.replace("é", "&eacute").encode(),
    "without accents": unicodedata.normalize("NFD", TALE).encode("ascii", "ignore"),
}


@pytest.mark.parametrize("message", LOST)
def test_a_text_that_has_lost_its_accents_is_refused(message):
    with pytest.raises(BadInput, match=message):
        read(LOST[message])
