"""Make the sample in `src/anybatch/data/sample/` out of the `arxiv-title-abstract` data set, deterministically.

Usage: python tools/pack_sample.py --data FOLDER
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

# A few neighbouring fields, so that papers of one field are real competition for each other.
CATEGORIES = ("cs.NI", "cs.CR", "cs.DC", "cs.SI", "stat.ME", "q-bio.PE")
TARGET = Path(__file__).parent.parent / "src" / "anybatch" / "data" / "sample"
SIZES = {"train": 10_240, "test": 1000}
CUT = 420  # characters of an abstract, cut at the end of a word


def main() -> None:
    """Draw, cut, pack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of arxiv-title-abstract")
    folder = parser.parse_args().data
    for split, size in SIZES.items():
        # The test split alone has too few papers of these fields, so dev and test (both 2019) are drawn from together.
        files = ["train"] if split == "train" else ["dev", "test"]
        rows = []
        for name in files:
            with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
                rows += [row for row in map(json.loads, file) if row["cat"] in CATEGORIES]
        rows = random.Random(0).sample(rows, min(size, len(rows)))
        lines = [
            json.dumps(
                {"title": row["title"], "abstract": shorten(row["abstract"]), "category": row["cat"], "id": row["id"]},
                ensure_ascii=False,
            )
            for row in rows
        ]
        target = TARGET / f"{split}.jsonl.gz"
        with (
            target.open("wb") as raw,
            gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=9, mtime=0, filename="") as packed,
        ):
            packed.write(("\n".join(lines) + "\n").encode())
        print(f"{target.name}: {len(rows)} pairs, {target.stat().st_size:,} bytes")


def shorten(text: str) -> str:
    """The first `CUT` characters, without a broken word at the end."""
    return text if len(text) <= CUT else text[:CUT].rsplit(" ", 1)[0]


if __name__ == "__main__":
    main()
