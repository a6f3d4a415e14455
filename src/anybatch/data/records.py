"""Rows of CSV, TSV, JSON lines, Parquet and data sets as mappings: every row once, or a message that names the line.
The text formats are not read by `datasets`, which fills short rows with None and takes "007" for 7 (docs/log.md).
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import glob
import gzip
import json
import logging
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, get_args

from anybatch.core.errors import AnybatchError
from anybatch.data.shards import tar_dataset

logger = logging.getLogger("anybatch")
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".tar")
FORMATS = (
    ".jsonl, .jsonl.gz, .csv, .csv.gz, .tsv, .tsv.gz, .parquet, .tar (webdataset), a folder saved by datasets' "
    "save_to_disk, or hf://OWNER/NAME of the Hugging Face hub"
)
NAME_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
Quoting = Literal["standard", "raw"]
PEEK = 1000  # rows of a JSON file whose keys say what columns it has
LONG = 10  # lines of one field with commas that all look like rows: more than chance
ODD = 10  # lines to one that is no row by itself, of a file that can be read without quoting
SHOWN, LONG_NAME = 20, 40  # names of columns in a message, and letters of each
TABLE = re.compile(r"\.[ct]sv(\.gz)?$", re.IGNORECASE)
DATA = re.compile(r"\s*[-+]?[\d.,]+\s*|.*\S\s+\S.*|\S{40,}", re.DOTALL)  # a number, several words, or a long one
RAW = (
    'In a quoted field a quote is written twice (""). If quotes are plain characters in this file, say so: '
    "data.quoting=raw."
)


def column_names(path: Path, quoting: Quoting | None = None) -> list[str]:
    """The columns of a file or data set, each once; of JSON lines, the keys of its first 1,000 rows."""
    if quoting not in (None, *get_args(Quoting)):
        raise AnybatchError(f"The quoting is {quoting!r}; expected one of {', '.join(get_args(Quoting))}, or nothing.")
    kind = _kind(path)
    if kind in (".csv", ".tsv"):
        names = next(_csv_rows(path, quoting), [])
    elif kind == ".parquet":
        import pyarrow.parquet

        with _reading(path):
            names = pyarrow.parquet.read_schema(path).names
    elif kind == "dataset":
        names = _load_dataset(path).column_names
    else:
        names = list(dict.fromkeys(key for record in islice(_json_records(path), PEEK) for key in record))
    twice = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if twice is not None:
        header = no_header(names, str(path))
        raise AnybatchError(f"{path} has the column '{twice}' more than once. Rename or remove all but one.{header}")
    return names


def records(
    path: Path, names: Sequence[str] | None = None, quoting: Quoting | None = None
) -> Iterator[Mapping[str, Any]]:
    """The rows of a file or data set, `names` of their columns or all; those of JSON lines come whole, or lack some."""
    kind = _kind(path)
    if kind in (".csv", ".tsv"):
        return _csv_records(path, names, quoting)
    if kind == ".parquet":
        return _parquet_records(path, names)
    if kind == "dataset":
        return _dataset_records(path, names)
    return _json_records(path)


def no_column(name: str, present: Sequence[str], where: str) -> AnybatchError:
    """The message for a column that is not there, with the nearest name."""
    close = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else no_header(present, where)
    return AnybatchError(f"There is no column '{name}' in {where}; it has {listed(present)}.{hint}")


def no_header(names: Sequence[str], where: str) -> str:
    """A question for a message, where what a table has as names looks like a row of data; else nothing."""
    if not TABLE.search(where) or not any(DATA.fullmatch(name) for name in names):
        return ""
    return " Has the file a header line? These look like a row of data; the names of columns go above it."


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message, the first of very many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    shown = (name if len(name) <= LONG_NAME else f"{name[:LONG_NAME]}..." for name in names[:SHOWN])
    return ", ".join(map(repr, shown)) + more or "none"


def _kind(path: Path) -> str:
    if path.parts[:1] == ("hf:",) or path.is_dir():
        return "dataset"
    if not path.exists():
        of_hub = f" A data set of the hub is named hf://{path}." if NAME_ON_HUB.fullmatch(str(path)) else ""
        raise AnybatchError(f"There is no file {path}. Check the path; expected {FORMATS}.{of_hub}")
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if kind not in KINDS:
        raise AnybatchError(f"Cannot tell the format of {path} from its name. Expected {FORMATS}.")
    if path.stat().st_size == 0:
        raise AnybatchError(f"{path} is empty (0 bytes). Expected {FORMATS}.")
    return "dataset" if kind == ".tar" else kind


def _open(path: Path, newline: str | None = None) -> IO[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def _unreadable(path: Path, line: int, error: Exception) -> AnybatchError:
    """The message for bytes that are no text, and for a gzip file cut short."""
    packed = path.suffix == ".gz"
    if not isinstance(error, UnicodeDecodeError):
        after, whole = f" after line {line}" if line else "", " in a whole gzip file" if packed else ""
        return AnybatchError(f"Cannot read {path}{after}: {error}. Expected UTF-8 text{whole}.")
    with path.open("rb") as file:
        head = file.read(4)
    if (head[:2] == b"\x1f\x8b" and not packed) or head == b"PAR1":
        kind = "Parquet: name it .parquet" if head == b"PAR1" else "packed with gzip: add .gz to its name"
        return AnybatchError(f"Cannot read {path}: it is {kind}.")
    # A file is decoded in blocks: where in it the byte is, only its lines say.
    opener: Any = gzip.open if packed else open
    with opener(path, "rb") as file:
        bad = next((number for number, text in enumerate(file, start=1) if not _is_utf8(text)), line + 1)
        file.seek(0)
        wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    kind, name = ("UTF-16", "UTF-16") if wide else ("WINDOWS-1252", "Latin-1 or Windows-1252")
    anew = path.with_name(f"utf8-{path.name.removesuffix('.gz')}")
    source, target = shlex.quote(str(path)), shlex.quote(str(anew))
    command = f"gzip -dc {source} | iconv -f {kind} -t UTF-8" if packed else f"iconv -f {kind} -t UTF-8 {source}"
    return AnybatchError(
        f"Cannot read line {bad} of {path}: it is not UTF-8 ({error.reason}: byte 0x{error.object[error.start]:02x}), "
        f"but perhaps {name}. Save the file as UTF-8, such as with: {command} > {target}"
    )


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _json_records(path: Path) -> Iterator[Mapping[str, Any]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _object(line, f"Line {number} of {path}")
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise _unreadable(path, number, error) from error


def _object(line: str, where: str) -> dict[str, Any]:
    array = " The file seems to be one JSON array: write its objects one a line." if line[0] == "[" else ""
    try:
        record = _decode(line)
        if "\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise AnybatchError(
            f"{where} is no JSON ({error.msg}, column {error.colno}). Expected one object a line.{array}"
        ) from error
    except UnicodeEncodeError as error:
        raise AnybatchError(
            f"{where} holds half of a surrogate pair ({error.object[error.start]!r}), which is no character. Write the "
            "file anew from its source, or leave the line out."
        ) from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, lists a thousand deep
        raise AnybatchError(f"{where} cannot be read: {error}.") from error
    if not isinstance(record, dict):
        raise AnybatchError(f"{where} holds a {type(record).__name__}; expected one JSON object a line.{array}")
    return record


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys, of which Python's own reader takes the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{twice}' stands a second time in one object, keep one of the two")
    return record


_decode = json.JSONDecoder(object_pairs_hook=_each_key_once).decode


def _csv_records(path: Path, names: Sequence[str] | None, quoting: Quoting | None) -> Iterator[Mapping[str, Any]]:
    rows = _csv_rows(path, quoting)
    places = {name: place for place, name in enumerate(next(rows, []))}
    wanted = [(name, places[name]) for name in (places if names is None else names)]
    for row in rows:
        yield {name: row[place] for name, place in wanted}


def _csv_rows(path: Path, quoting: Quoting | None) -> Iterator[list[str]]:
    """Header and rows of one width. A quote that swallows rows is found by what follows the closing one, or said."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    rules = csv.QUOTE_NONE if quoting == "raw" else csv.QUOTE_MINIMAL
    width, first, last = 0, 1, 0  # fields of a row; its lines
    plain = None
    reader = csv.reader(())
    try:
        with _open(path, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=rules, strict=True)
            for row in reader:
                first, last = last + 1, reader.line_num
                if not row:  # a blank line
                    continue
                width = width or len(row)
                if len(row) != width:
                    lines = f"Lines {first} to {last}" if last > first else f"Line {first}"
                    raise AnybatchError(
                        f"{lines} of {path}: another number of fields ({len(row)}) than the header ({width}). "
                        f"Quote fields that hold the separator or a line break. {'' if quoting else RAW}".strip()
                    )
                if last > first and quoting is None and _could_be_rows(row, delimiter):
                    plain = _has_plain_lines(path, delimiter, width) if plain is None else plain
                    if plain or last - first >= LONG:
                        _doubt(path, first, last, certain=delimiter == "\t" or last - first >= LONG)
                yield row
    except csv.Error as error:
        endless = "end of data" in str(error)
        ends = "does not end" if endless else f"ends in line {reader.line_num} with more text behind it"
        raise AnybatchError(f"Line {last + 1} of {path} opens a quoted field that {ends}. {RAW}") from error
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise _unreadable(path, last, error) from error


def _doubt(path: Path, first: int, last: int, *, certain: bool) -> None:
    """Refuse a quoted field that may have swallowed rows, or warn: commas and line breaks do stand in texts."""
    text = (
        f"Line {first} of {path} opens a quoted field that ends in line {last}, and each of these lines would be a row "
        "by itself. {}data.quoting=raw, quotes are plain characters and each line is a row; or data.quoting=standard, "
        "quoted texts hold line breaks."
    )
    if certain:
        raise AnybatchError(text.format("Say which is meant: "))
    logger.warning(text.format("It is read as one text. Say if it is not, or that it is: "))


def _could_be_rows(row: list[str], delimiter: str) -> bool:
    lines = re.split(r"\r\n|\r|\n", delimiter.join(row))
    return all(line.count(delimiter) == len(row) - 1 for line in lines)


def _has_plain_lines(path: Path, delimiter: str, width: int) -> bool:
    """Whether a file can be read without quoting: no column's name is quoted, 9 of 10 lines have a row's width."""
    with _open(path, newline="") as file:
        if file.readline().startswith('"'):
            return False
        lines = odd = 0
        for line in file:
            lines += 1
            odd += bool(line.strip("\r\n")) and line.count(delimiter) != width - 1
        return odd * ODD <= lines


@contextlib.contextmanager
def _reading(path: Path, kind: str = "Parquet") -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise AnybatchError(f"Cannot read {path} as {kind}: {error}. Write it anew from its source.") from error


def _parquet_records(path: Path, names: Sequence[str] | None) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet

    with _reading(path), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=None if names is None else list(names)):
            yield from batch.to_pylist()


def _dataset_records(path: Path, names: Sequence[str] | None) -> Iterator[Mapping[str, Any]]:
    with _reading(path, "a saved data set"):
        dataset = _load_dataset(path).with_format(None)  # one that was saved with a format would give arrays
        yield from dataset if names is None else dataset.select_columns(list(names))


def _load_dataset(path: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    if path.parts[0] == "hf:":
        return _load_from_hub(*path.parts[1:5])
    if path.is_file():
        return tar_dataset(path)
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise AnybatchError(f"{path} is no folder saved by datasets' save_to_disk ({error}).") from error
    if isinstance(dataset, DatasetDict):
        splits = [str(name) for name in dataset]
        raise AnybatchError(
            f"{path} holds the splits {', '.join(splits)}; give the folder of one of them, such as {path / splits[0]}."
        )
    return dataset


@functools.lru_cache(maxsize=4)
def _load_from_hub(owner: str, name: str = "", configuration: str | None = None, split: str = "train") -> Any:
    from datasets import load_dataset

    name, _, of_name = name.partition(":")
    try:
        return load_dataset(f"{owner}/{name}", configuration, split=of_name or split)
    except Exception as error:  # of the connection, of a name, of a builder: `datasets` has many
        raise AnybatchError(
            f"Cannot load {owner}/{name} from the Hugging Face hub ({error}). Check the connection and the name, "
            "hf://OWNER/NAME, hf://OWNER/NAME:SPLIT or hf://OWNER/NAME/CONFIGURATION/SPLIT; or download it and "
            "give the file."
        ) from error


def is_image(feature: Any) -> bool:
    """Whether it is the feature `datasets.Image`, or what is stored of one: bytes and a path."""
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})


def has_images(feature: Any) -> bool:
    """Whether a column of this feature holds images: alone, in lists, beside texts."""
    within = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return is_image(feature) or any(has_images(inner) for inner in within if inner is not None)


def image_dataset(path: Path, names: Iterable[str]) -> Any:
    """The file or data set as a memory-mapped `datasets.Dataset` if any of these columns holds images, else None."""
    kind = _kind(path)
    if kind not in ("dataset", ".parquet"):
        return None
    import pyarrow.parquet
    from datasets import Dataset, Features

    if kind == "dataset":
        dataset = _load_dataset(path)
        return dataset if any(has_images(dataset.features.get(name)) for name in names) else None
    with _reading(path):
        schema, num_rows = pyarrow.parquet.read_schema(path), pyarrow.parquet.read_metadata(path).num_rows
    if not any(pyarrow.types.is_nested(schema.field(name).type) for name in names):
        return None
    features = Features.from_arrow_schema(schema)
    if not any(has_images(features.get(name)) for name in names):
        return None
    try:
        dataset: Any = Dataset.from_parquet(glob.escape(str(path)))  # which takes names for patterns
    except Exception as error:  # a broken page, a full disk: `datasets` wraps nearly anything
        raise AnybatchError(
            f"{path} cannot be read ({error}). Write the file anew, or free some space for the cache of `datasets`."
        ) from error
    if len(dataset) != num_rows:
        raise AnybatchError(
            f"{path} has {num_rows} rows, and `datasets` gave {len(dataset)}. Move the file to a path of plain letters."
        )
    return dataset
