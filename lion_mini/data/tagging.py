"""RAM's tags for a file of training records (`infer.py --tags --data`), so that training need not run RAM."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm, trange

from ..files import reading
from ..images import open_image
from .records import Records, check


def tag_records(source: Records, out: Path, batch_size: int, tagger: Callable[[list], list]) -> int:
    """Write the records to `out`, one per line in their order; those without tags get the tags of their picture.

    A record that cannot be used is named on stderr and copied. The first records may be in `out` already. `tagger` maps
    pictures to lists of tags, and is not called if none are missing. Returns how many records have no tags.
    """
    (done, lacking), tags = resume(source, out), dict[Path, list[str]]()
    with open(out, "ab") as file:
        for start in trange(done, len(source), batch_size, unit_scale=batch_size, disable=None):
            batch = range(start, min(start + batch_size, len(source)))
            paths, new = dict[int, Path](), dict[Path, Any]()  # per record; each picture that has no tags yet
            for i in batch:
                try:
                    with reading(source.name(i)):
                        fields = check(source.raw(i))
                        if fields["tags"] is None:
                            if (path := source.picture(fields["image"])) not in tags:
                                new[path], tags[path] = open_image(path), []
                            paths[i] = path
                except ValueError as error:
                    lacking += split(as_line(source, i))[1] is None
                    tqdm.write(str(error), file=sys.stderr)
            tags.update(zip(new, tagger(list(new.values())) if new else (), strict=True))
            for i in batch:
                file.write(as_line(source, i, {"tags": tags[paths[i]]} if i in paths else {}) + b"\n")
            file.flush()
    return lacking


def resume(source: Records, out: Path) -> tuple[int, int]:
    """Count the records in `out`, and those of them without tags. A killed run's torn last line is cut off."""
    if out.is_dir() or out.resolve() == source.path.resolve():
        raise ValueError(f"--out {out} is a folder or the file that --data reads: choose another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    *lines, torn = out.read_bytes().split(b"\n") if out.exists() else [b""]
    line = as_line(source, min(max(len(lines), 1), len(source)) - 1)
    ours = split(lines[-1])[0] == split(line)[0] if lines else torn.startswith(line[:-1][: len(torn)])
    if not ours or len(lines) > len(source):
        raise ValueError(f"--out {out} does not hold the first records of --data: choose another file")
    if torn:
        os.truncate(out, out.stat().st_size - len(torn))
    return len(lines), sum(split(line)[1] is None for line in lines)


def as_line(source: Records, index: int, more: dict[str, Any] | None = None) -> bytes:
    """The record as one line of JSON, with `more` fields. A line that is not JSON stays as it is."""
    with suppress(ValueError, RecursionError):
        record = source.raw(index)
        return json.dumps(record | more if more else record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return source.line(index).strip()


def split(line: bytes) -> tuple[Any, Any]:
    """The record of a line without its tags, and the tags."""
    with suppress(ValueError, RecursionError):
        if isinstance(record := json.loads(line), dict):
            return record, record.pop("tags", None)
    return line, None
