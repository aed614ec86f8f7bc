"""The edge: foreign files come in, whole files go out, and every fault becomes one sentence.

with reading(path): ...             whatever is raised in here becomes ValueError("path: reason")
with atomic_write(path) as new: ... the file or folder is there as a whole or not at all
run(main, args)                     a script's way out: one sentence on stderr and exit code 2
"""

import inspect
import json
import os
import pickle
import shutil
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

# --- one sentence


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever is raised while foreign data is read into one ValueError, `what: reason`."""
    try:
        yield
    except Exception as error:
        text, place = reason(error), printable(what)
        raise ValueError(text if text.startswith(place) else f"{place}: {text}") from error


def reason(error: BaseException) -> str:
    """What went wrong, on one line that a terminal can show."""
    match error:
        case UnicodeDecodeError():
            text = "it is not UTF-8 text"
        case json.JSONDecodeError():
            text = f"it is not whole JSON: {error.msg} at character {error.pos + 1}"
        case RecursionError():
            text = "it is nested too deeply"
        case OSError() if error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        case KeyError():
            text = f"the field {error} is missing"
        case TypeError() | AttributeError() | IndexError():
            text = f"it has another form than expected: {error}"
        case pickle.UnpicklingError():
            text = "it is damaged, or holds more than plain data, which could run code, and is refused"
        case _:
            text = str(error).strip().split("\n")[0] or f"it is damaged ({type(error).__name__})"
    return printable(text)


def printable(text: object) -> str:
    """The text without line breaks, escape sequences and halves of surrogate pairs."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in str(text))


def run(main: Callable[[Any], int | None], args: Any) -> int:
    """Call `main(args)`; returns the exit code. An error is one sentence on stderr; LION_DEBUG=1 adds the traceback."""
    try:
        return main(args) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("LION_DEBUG"):
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError))
        text = reason(error) if expected else printable(f"{error!r:.300}; LION_DEBUG=1 shows where")
        print(f"{Path(inspect.getfile(main)).name}: {text}", file=sys.stderr)
        return 2


# --- text


def read_text(path: Path) -> str:
    with reading(path):
        return path.read_text(encoding="utf-8-sig")


def read_lines(path: Path) -> list[str]:
    """The lines, stripped, without the empty ones at the end."""
    text = read_text(path).rstrip()
    return [line.strip() for line in text.split("\n")] if text else []


def read_json(path: Path, kind: type | tuple[type, ...] = dict) -> Any:
    with reading(path):
        return need(json.loads(read_text(path)), kind)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each JSON line with its place, "path, line 3"."""
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with reading(place := f"{path}, line {number}"):
                if text := line.decode("utf-8-sig").strip():
                    yield place, json.loads(text)


NAMES = {
    dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip


def need(value: Any, kind: type | tuple[type, ...], name: str = "it") -> Any:
    """The value if it is of that type, else a ValueError. A bool is no number; an int will do for a float."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(NAMES.get(k, k.__name__) for k in kinds)
        raise ValueError(f"{name} must be {expected}, found {value!r:.60}")
    return value


# --- writing


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a new path beside `path`, for a file or folder. On success it is synced and renamed to `path`.

    A file is replaced, a folder only if it is empty. An OSError names the path. A killed process leaves `.name.new`,
    which the next write removes.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        yield new
        sync(new)
        new.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        if isinstance(error, OSError) and error.filename and new.name not in str(error):
            raise
        why = getattr(error, "strerror", None) or f"it cannot be written, is the disk full? ({reason(error)})"
        raise OSError(getattr(error, "errno", None) or 0, why, str(path)) from error
    finally:
        remove(new)


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists and can be deleted."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. Files get the umask's mode, because safetensors creates them private."""
    os.umask(mask := os.umask(0))
    for each in (*path.rglob("*"), path):
        if each.is_file():
            each.chmod(0o666 & ~mask)
        handle = os.open(each, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# --- tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, memory-mapped unless it has torch's old format. No code in it can run."""
    with reading(f"{file} is not a whole checkpoint"):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        data = need(torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)), dict)
        data = data["model"] if isinstance(data.get("model"), dict) else data
        for name, value in data.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor with a name")
        return data


class Tensors:
    """A checkpoint file, or folder of shards: names and shapes at once, each tensor on request.

    `renamed` maps parts of old names to new ones. One file is mapped at a time, and anew after 1 GiB, because mapped
    pages count as memory in use.
    """

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None):
        self.path = path
        self.where: dict[str, tuple[Path, str]] = {}  # by new name: file, and name in the file
        self.shapes: dict[str, torch.Size] = {}
        self._file, self._tensors, self._room = Path(), dict[str, Tensor](), 0
        for file in shards(path):
            for theirs, tensor in read_tensors(file).items():
                name = theirs
                for old, new in (renamed or {}).items():
                    name = name.replace(old, new)
                if name in self.where:
                    raise ValueError(f"{file}: {name} stands in {self.where[name][0].name} already")
                self.where[name], self.shapes[name] = (file, theirs), tensor.shape

    def read(self, name: str) -> Tensor:
        file, theirs = self.where[name]
        if file != self._file or self._room < 0:
            self._tensors.clear()
            self._file, self._tensors, self._room = file, read_tensors(file), 2**30
        self._room -= self._tensors[theirs].nbytes
        return self._tensors[theirs]


def shards(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or those that the folder's index or the usual names point to."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        return [path]
    for file in (path / "model.safetensors", path / "pytorch_model.bin"):
        if (index := path / f"{file.name}.index.json").is_file():
            with reading(index):
                return [path / Path(name).name for name in sorted(set(read_json(index)["weight_map"].values()))]
        if file.is_file():
            return [file]
    if path.is_file():
        raise ValueError(f"{path}: a checkpoint is a .pth, .pt, .bin or .safetensors file, not {path.suffix!r}")
    raise ValueError(f"{path} holds no model.safetensors, no pytorch_model.bin and no index of shards")


def read_folder(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, int8 as it is and all others as `dtype` (None: as stored).

    On the CPU and in the stored dtype they are memory-mapped: the first use reads one from the disk.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise ValueError(f"{path}: {name} stands in another shard too")
            if tensor.dtype == torch.int8:
                tensors[name] = tensor.to(device, copy=True)  # aligned memory, which the CPU's int8 product needs
            elif tensor.is_floating_point():
                tensors[name] = tensor.to(device, dtype)
            else:
                raise ValueError(f"{path}: {name} is of type {tensor.dtype}: convert the weights again")
    if not tensors:
        raise ValueError(f"{folder} holds no .safetensors file")
    return tensors


def check_tensors(where: object, found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Compare with the model's names and shapes. A ValueError names the first that is missing, unknown or different."""
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{where}: {missing[0]} is missing, and {len(missing) - 1} more")
    if unknown := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{where}: {unknown[0]} belongs to no part of this model")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(found[name])}, the model {tuple(shape)}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def write_shards(folder: Path, plan: Mapping[str, Tensor], read: Callable[[str], Tensor], limit: int = 2**30) -> None:
    """Safetensors files of about `limit` bytes and their index; memory holds one file.

    `plan` gives names, shapes and dtypes and may be on the meta device. `read` gives the tensors.
    """
    ends = dict(zip(plan, accumulate(tensor.nbytes for tensor in plan.values()), strict=True))
    groups = [list(names) for _, names in groupby(plan, lambda name: (ends[name] - 1) // limit)]
    weight_map: dict[str, str] = {}
    with tqdm(total=len(plan), desc="convert", unit="tensor", disable=None) as bar:
        for number, names in enumerate(groups, 1):
            tensors = {}
            for name in names:  # copies: safetensors refuses tensors that share memory
                tensors[name] = read(name).to(plan[name].dtype, copy=True, memory_format=torch.contiguous_format)
                bar.update()
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
            save_file(tensors, folder / file)
            weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in plan.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
