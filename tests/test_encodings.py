"""Texts in every encoding that French files come in, and those that must be refused."""

import random

import pytest
from small_tokenizers import tales

from prep.common import BadInput
from prep.encodings import decode

TALE = tales()[0].replace("'", "’").replace("—", "–")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "cp850", "mac_roman"])
def test_a_text_comes_back_from_every_encoding(encoding):
    text = "".join(c for c in TALE if c.encode(encoding, "ignore").decode(encoding))
    assert decode(text.encode(encoding), "conte.txt") == text


@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_utf8_encoded_twice_and_cp1252_taken_for_latin1_are_repaired(wrong):
    text = (
        TALE.replace("à", "a").replace("À", "A").replace("Œ", "OE")
    )  # a0 and 9d are no characters of CP1252 everywhere
    assert decode(text.encode().decode(wrong).encode(), "conte.txt") == text
    text = TALE.encode("cp1252", "ignore").decode("cp1252")
    assert decode(text.encode("cp1252").decode("latin-1").encode(), "conte.txt") == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TALE.encode("ascii", "replace").replace(b"?", "\ufffd".encode()), "has lost"),
        (TALE.encode("cp037", "ignore"), "encoding|UTF-8"),
        (random.Random(1).randbytes(5000), "UTF-8"),
        ((TALE + TALE.encode().decode("latin-1")).encode(), "twice"),
        ("К. открыл дверь, и никто не ответил ему.".encode("cp1251"), "French"),
    ],
    ids=["replacement characters", "EBCDIC", "binary", "half of it twice", "Cyrillic"],
)
def test_what_cannot_be_read_for_certain_is_refused_by_name(data, message):
    with pytest.raises(BadInput, match=f"conte.txt .*({message})"):
        decode(data, "conte.txt")
