"""The demo's tales as a library of parquet files, and prep/gallica.py run on it in this process."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from small_tokenizers import tales

from prep.gallica import main
from prep.rows import manifest_path

TEXTS = ("file_id", "title", "author", "date", "complete_text")
SCHEMA = pa.schema([(name, pa.string()) for name in TEXTS] + [("character_count", pa.int64())])


def books() -> list[dict[str, Any]]:
    """15 tales of 15 kB each; one has no author, one no full date."""
    records = []
    for number, tale in enumerate(tales(), 1):
        head, _, text = tale.partition("\n\n")
        fields = dict(line.split(" : ", 1) for line in head.split("\n"))
        records.append(
            {
                "file_id": f"bpt{number:02d}",
                "title": fields["Titre"],
                "author": fields["Auteur"] if number != 3 else None,
                "date": fields["Date"] if number != 4 else "1876-????",
                "character_count": len(text),
                "complete_text": text,
            }
        )
    return records


def library(folder: Path, records: list[dict[str, Any]], files: int = 3) -> Path:
    """Write books into a few parquet files, dealt out like cards."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        pq.write_table(pa.Table.from_pylist(records[i::files], SCHEMA), folder / f"gallica_mono_{i + 1}.parquet")
    return folder


def prepare(source: Path, tokenizer: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Run the script's main and return its manifest. Defaults: 512 tokens, everything, a fifth held out."""
    given = {"sequence_len": 512, "windows": "all", "holdout": 0.2, "workers": 1} | options
    argv = ["--source", str(source), "--tokenizer", str(tokenizer), "--out", str(out)]
    main(argv + [str(word) for key, value in given.items() for word in ("--" + key.replace("_", "-"), value)])
    return json.loads(manifest_path(out).read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def snippets(row: dict[str, Any]) -> set[str]:
    """80 characters from every word on: two rows that overlap have some in common."""
    text = row["text"]
    return {text[m.start() : m.start() + 80] for m in re.finditer(r"(?<!\S)\S", text[:-80])}
