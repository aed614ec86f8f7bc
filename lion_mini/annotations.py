"""Other people's files: JSON, JSON lines and Python 2's pickles, their fields, and where their pictures are.

What is wrong with one is a ValueError in one sentence that names the file, the place and the field:

    vsr.jsonl, line 3: the field label is missing

next: readers.py
"""

import io
import json
import pickle
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {'is empty' if not path.stat().st_size else f'is not whole JSON: {error}'}") from None


def load_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each JSON line with its place."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}, line {number}", json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"{path}, line {number}: not whole JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


class _Harmless(pickle.Unpickler):
    """refer's files hold dicts, lists, texts and numbers; whatever wants to be imported is no annotation."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain data is read")


# What a pickle that is cut or changed makes its reader raise.
BROKEN = (
    pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, ImportError, ArithmeticError,
    MemoryError, RecursionError, struct.error,
)  # fmt: skip


def load_pickle(path: Path) -> Any:
    try:
        return _Harmless(io.BytesIO(path.read_bytes()), encoding="latin1").load()  # written by Python 2
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except BROKEN as error:
        raise ValueError(f"{path} is not a pickle of annotations: {error or 'it is empty'}") from None


def get(record: Any, name: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """The field, of that type; ValueError with the place where it is not."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with {name}, found {record!r:.40}")
    if name not in record:
        raise ValueError(f"{where}: the field {name} is missing")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {name} is {value!r:.40}")
    return value


def rows(data: Any, path: Path, name: str = "") -> Iterator[tuple[str, Any]]:
    """The records of a list, or of the list under this name, each with its place."""
    listed = get(data, name, str(path), list) if name else data
    if not isinstance(listed, list):
        raise ValueError(f"{path}: expected a list of records, found {listed!r:.40}")
    for i, record in enumerate(listed, 1):
        yield f"{path}, {name + ' ' if name else ''}record {i}", record


def texts(record: Any, name: str, where: str) -> tuple[str, ...]:
    found = get(record, name, where, (list, str))
    found = [found] if isinstance(found, str) else found
    if not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{where}: {name} is {found!r:.40}, not texts")
    return tuple(found)


def whole(record: Any, name: str, where: str) -> int:
    """A whole number, which some files write as text."""
    value = get(record, name, where, (int, str))
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{where}: {name} is {value!r:.40}, not a whole number") from None


def one(paths: Sequence[Path]) -> Path:
    if len(paths) != 1:
        raise ValueError(f"expected one annotation file, found {len(paths)}: {', '.join(map(str, paths))}")
    return paths[0]


def numbers(row: Any, name: str, count: int, where: str) -> list[float]:
    values = get(row, name, where, (list, tuple))
    if len(values) != count or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{where}: {name} is {values!r:.60}, not {count} numbers")
    return [*values]
