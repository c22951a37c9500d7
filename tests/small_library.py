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
        title, author, date = (line.split(" : ", 1)[1] for line in head.split("\n"))
        fields = {"title": title, "author": author, "date": date, "character_count": len(text), "complete_text": text}
        records.append({"file_id": f"bpt{number:02d}"} | fields)
    records[2]["author"], records[3]["date"] = None, "1876-????"
    return records


def library(folder: Path, records: list[dict[str, Any]], files: int = 3) -> Path:
    """Write books into a few parquet files, dealt out like cards."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        pq.write_table(pa.Table.from_pylist(records[i::files], SCHEMA), folder / f"gallica_mono_{i + 1}.parquet")
    return folder


def words(source: Path, tokenizer: Path, out: Path, **options: Any) -> list[str]:
    given = {"sequence_len": 512, "windows": "all", "holdout": 0.2, "workers": 1} | options
    given = {"source": source, "tokenizer": tokenizer, "out": out} | given
    return [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]


def prepare(source: Path, tokenizer: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Run the script's main and return its manifest. Defaults: 512 tokens, everything, a fifth held out."""
    main(words(source, tokenizer, out, **options))
    return json.loads(manifest_path(out).read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def snippets(row: dict[str, Any]) -> set[str]:
    """80 characters from every word on: two rows that overlap have some in common."""
    text = row["text"]
    return {text[m.start() : m.start() + 80] for m in re.finditer(r"(?<!\S)\S", text[:-80])}
