"""Reading CSV files: row by row, with the columns that are wanted. Standard library only."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from simpletuner.data.storages.errors import StorageError

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DELIMITERS = (",", ";", "\t")
_LONGEST_FIELD = 1 << 20


def read_rows(path: Path, columns: Sequence[str], *, option: str) -> Iterator[tuple[str, ...]]:
    """Yield the values of `columns`, stripped, for every row of a CSV file with a header.

    UTF-8 or, with its mark, UTF-16. Columns are separated by what separates the wanted ones in the header: comma,
    semicolon or tab. `option` is the key that named the file.

    Raises: StorageError: no such file, no such column, not a text, broken quotes.
    """
    place = str(path)
    try:
        with path.open("rb") as raw:
            encoding = "utf-16" if raw.read(2) in _UTF16_MARKS else "utf-8-sig"
        with path.open(encoding=encoding, newline="") as stream:
            header = stream.readline()
            delimiter = _delimiter(header, columns)
            names = [name.strip() for name in next(_reader([header], delimiter), [])]
            missing = [column for column in columns if column not in names]
            if missing:
                raise missing_columns(place, option, missing, names)
            wanted = [names.index(column) for column in columns]
            for row in _reader(stream, delimiter):
                if row:
                    yield tuple(row[index].strip() if index < len(row) else "" for index in wanted)
    except StorageError:
        raise
    except UnicodeError as error:
        raise StorageError("E-TABLE-ENCODING", place=place, params={"key": option}) from error
    except csv.Error as error:
        raise StorageError("E-TABLE-DAMAGED", place=place, reason=str(error), params={"key": option}) from error
    except OSError as error:
        params = {"key": option}
        raise StorageError(
            "E-TABLE-MISSING", place=place, reason=error.strerror or str(error), params=params
        ) from error


def missing_columns(place: str, option: str, missing: Sequence[str], there: Sequence[str]) -> StorageError:
    """The error of a table that lacks columns; `option` names the table."""
    params = {"key": option, "missing": ", ".join(missing), "columns": ", ".join(there) or "-"}
    return StorageError("E-TABLE-COLUMN", place=place, params=params)


def _delimiter(header: str, columns: Sequence[str]) -> str:
    """The one that separates most of the wanted columns."""

    def found(delimiter: str) -> int:
        names = {name.strip() for name in next(_reader([header], delimiter), [])}
        return len(names & set(columns))

    return max(_DELIMITERS, key=found)


def _reader(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(_LONGEST_FIELD)
    return csv.reader(lines, delimiter=delimiter, strict=True)
