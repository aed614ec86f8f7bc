"""A file of predictions, one a line as they come, below a line that says how they were made.

    {"task": "coco", "decoding": "greedy", "template": "A short image description:", "batch_size": 8, ...}
    {"id": "391895", "prompt": "A short image description:", "text": "a man on a motorbike"}
    {"id": "60623", ...                                  torn by a kill: as if it had never been begun

Several processes write a part each, below the same line, which `join` brings into the examples' order.
next: ../eval.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def part(path: Path, rank: int | str) -> Path:
    return path.with_name(f"{path.stem}.part{rank}{path.suffix}")


def join(path: Path, ids: Sequence[str], first: dict[str, Any]) -> None:
    """The file and its parts as one file, in the examples' order; a line that a kill cut off is not in it."""
    parts = sorted(path.parent.glob(part(path, "*").name))
    known = load(path, ids, first) if path.exists() else {}
    for other in parts:
        known |= load(other, ids, first)
    lines = [first, *(known[id] for id in ids if id in known)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        new = path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    for other in parts:
        other.unlink()


def load(path: Path, ids: Sequence[str], first: dict[str, Any] | None) -> dict[str, Any]:
    """Predictions by id. With `first` they must have been made so; an id that nobody asked for is refused."""
    asked, known = set(ids), dict[str, Any]()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"the predictions {path} cannot be read: {error.strerror}") from None
    for i, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
            if not isinstance(line, dict):
                raise ValueError(f"found {line!r:.40}")
        except ValueError as error:
            if i == len(lines):  # no line end follows: it was never finished
                break
            raise ValueError(f"{path}, line {i}: not a prediction: {error}") from None
        if "task" in line:
            odd = [name for name, value in (first or {}).items() if name != "weights" and line.get(name) != value]
            if odd:
                raise ValueError(
                    f"{path} was made with another {odd[0]}, {line.get(odd[0])!r} and not {(first or {})[odd[0]]!r}: "
                    "choose another --out, or delete it"
                )
            continue
        id = str(line.get("id"))
        if id not in asked:
            raise ValueError(f"{path}, line {i}: the id {id} is not in the annotations")
        if id in known:
            raise ValueError(f"{path}, line {i}: the id {id} is predicted twice")
        if not isinstance(line.get("text"), str) and not isinstance(line.get("scores"), list):
            raise ValueError(f"{path}, line {i}: it has neither text nor scores")
        known[id] = line
    return known
