"""A file of predictions: JSON lines, written as they come, below a header that says how they are made.

    {"task": "coco", "decoding": "greedy", "template": "A short image description:", "batch_size": 8, ...}
    {"id": "391895", "prompt": "A short image description:", "text": "a man on a motorbike"}
    {"id": "60623", ...                                  cut off by a kill: not a prediction

Under torchrun each rank writes a part with the same header, and rank 0 joins them in the examples' order.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write, need, reading

Header = dict[str, Any]


def part(path: Path, rank: int | str) -> Path:
    return path.with_name(f"{path.stem}.part{rank}{path.suffix}")


def join(path: Path, ids: Sequence[str], header: Header) -> None:
    """Merge the file and its parts into one, in the order of `ids`, without what a kill cut off."""
    parts, known = sorted(path.parent.glob(part(path, "*").name)), dict[str, Any]()
    for file in [path, *parts] if path.exists() else parts:
        known |= load(file, ids, header)[1]
    with atomic_write(path) as new:
        lines = (header, *(known[id] for id in ids if id in known))
        new.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    for file in parts:
        file.unlink()


def load(path: Path, ids: Sequence[str], header: Header) -> tuple[Header, dict[str, Any]]:
    """The header and the predictions by id. A ValueError if a setting is not as in `header`, or an id not in `ids`."""
    asked, made, known = set(ids), dict[str, Any](), dict[str, Any]()
    with reading(path):
        lines = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, 1):
        with reading(f"{path}, line {number}"):
            try:
                line = need(json.loads(raw.strip() or b"{}"), dict)
            except ValueError:
                if number < len(lines):
                    raise
                line = {}  # a kill cut it off: no line end follows
            if "task" in line:
                made = line
                if odd := [name for name in header if name != "weights" and line.get(name) != header[name]]:
                    was = f"{odd[0]} {line.get(odd[0])!r}, not {header[odd[0]]!r}"
                    raise ValueError(f"made with {was}: choose another --out, or delete the file")
            elif line:
                id = str(line.get("id"))
                if id not in asked:
                    raise ValueError(f"the id {id} is not in the annotations")
                if id in known:
                    raise ValueError(f"the id {id} is predicted twice")
                if not isinstance(line.get("text"), str) and not isinstance(line.get("scores"), list):
                    raise ValueError("it has neither text nor scores")
                known[id] = line
    return made, known
