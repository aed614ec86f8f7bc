"""The edge: other people's files come in, whole files go out, and whatever is wrong becomes one sentence.

with reading(path): ...             anything raised in here becomes ValueError("path: reason")
with atomic_write(path) as new: ... a file or folder that is whole or not there
run(main, args)                     a script's way out: the sentence on stderr and exit code 2
"""

import codecs
import inspect
import json
import os
import pickle
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        text = reason(error)
        raise ValueError(text if text.startswith(printable(what)) else printable(f"{what}: {text}")) from error


def reason(error: BaseException) -> str:
    """What went wrong, on one line that a terminal can show."""
    match error:
        case UnicodeDecodeError():
            text = "it is not UTF-8 text"
        case json.JSONDecodeError():
            text = f"it is not whole JSON: {error}"
        case RecursionError():
            text = "it is nested too deeply"
        case OSError() if error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        case KeyError():
            text = f"the field {error} is missing"
        case pickle.UnpicklingError():
            text = "it holds more than plain data, which could run code, and is refused"
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
        text = reason(error) if expected else f"{type(error).__name__}: {reason(error)}; LION_DEBUG=1 shows where"
        print(f"{Path(inspect.getfile(main)).name}: {text}", file=sys.stderr)
        return 2


# --- text


def read_text(path: Path) -> str:
    with reading(path):
        return path.read_text(encoding="utf-8-sig")


def read_lines(path: Path) -> list[str]:
    """The lines, stripped, without the empty ones at the end."""
    return [line.strip() for line in read_text(path).rstrip().split("\n")]


def read_json(path: Path, kind: type = dict) -> Any:
    with reading(path):
        return need(json.loads(path.read_text(encoding="utf-8-sig")), kind)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each JSON line with its place, "path, line 3"."""
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line := line.removeprefix(codecs.BOM_UTF8).strip():
                with reading(place := f"{path}, line {number}"):
                    yield place, json.loads(line)


def need(value: Any, kind: type | tuple[type, ...], name: str = "") -> Any:
    """The value if it is of that type, else a ValueError. A bool is no number; an int will do for a float."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(NAMES.get(k, k.__name__) for k in kinds)
        raise ValueError(f"{name} must be {expected}, found {value!r:.60}".strip())
    return value


NAMES = {
    dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip


# --- writing


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a new path beside `path`, for a file or folder; it is synced and renamed to `path` if all goes well.

    An OSError names the path. What a killed process left is overwritten by the next one.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        yield new
        sync(new)
        new.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        remove(new)
        if isinstance(error, OSError) and error.filename and not str(error.filename).startswith(str(new)):
            raise
        raise OSError(getattr(error, "errno", None) or 0, reason(error), str(path)) from error
    except BaseException:
        remove(new)
        raise


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk; its files get the mode that the umask gives."""
    os.umask(mask := os.umask(0))
    for each in (*path.glob("*"), path) if path.is_dir() else (path,):
        if each.is_file():
            each.chmod(0o666 & ~mask)
        handle = os.open(each, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# --- tensors


class Tensors:
    """A checkpoint file, or folder of shards: names and shapes at once, each tensor when it is asked for.

    Torch files are unpickled with `weights_only=True`, so nothing in them can run. `renamed` maps parts of old names.
    """

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None):
        self.path = path
        self.where: dict[str, tuple[Path, str]] = {}  # by new name: file, and name in the file
        self.shapes: dict[str, torch.Size] = {}
        self._open: dict[Path, Any] = {}
        for file in shards(path):
            with reading(file):
                handle = self._handle(file)
                for theirs in list(handle.keys()):
                    name = theirs
                    for old, new in (renamed or {}).items():
                        name = name.replace(old, new)
                    if name in self.where:
                        raise ValueError(f"{name} stands in {self.where[name][0].name} already")
                    shape = handle[theirs].shape if isinstance(handle, dict) else handle.get_slice(theirs).get_shape()
                    self.where[name], self.shapes[name] = (file, theirs), torch.Size(shape)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open.clear()  # one file at a time: mapped pages count as memory in use
            safe = file.suffix == ".safetensors"
            self._open[file] = safe_open(file, framework="pt") if safe else unpickle(file)
        return self._open[file]

    def read(self, name: str) -> Tensor:
        file, theirs = self.where[name]
        with reading(f"{file}, {name}"):
            handle = self._handle(file)
            return handle[theirs] if isinstance(handle, dict) else handle.get_tensor(theirs)


def shards(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or those that the folder's index or the usual names point to."""
    if path.is_file():
        if path.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
            raise ValueError(f"{path}: a checkpoint is a .pth, .pt, .bin or .safetensors file, not {path.suffix!r}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(need(read_json(index).get("weight_map"), dict, f"{index}: weight_map").values()))
            missing = [name for name in names if Path(name).name != name or not (path / name).is_file()]
            if missing or not names:
                raise ValueError(f"{index} names {missing or 'no file'}, which is not in the folder")
            return [path / name for name in names]
        if (path / stem).is_file():
            return [path / stem]
    raise ValueError(f"{path} holds no model.safetensors, no pytorch_model.bin and no index of shards")


def unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, memory-mapped where its format allows."""
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        data = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    if not isinstance(data, dict) or not data:
        raise ValueError(f"it holds a {type(data).__name__}, not a dictionary of tensors")
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor with a name")
    return data


def read_folder(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, int8 as it is and all others as `dtype` (None: as stored).

    On the CPU and in the stored dtype they are memory-mapped: the first use reads one from the disk.
    """
    tensors: dict[str, Tensor] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no .safetensors file")
    for path in paths:
        with reading(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in tensors:
                    raise ValueError(f"{name} stands in another shard too")
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point() and tensor.dtype != torch.int8:
                    raise ValueError(f"{name} is of type {tensor.dtype}: convert the weights again")
                if tensor.dtype == torch.int8:
                    tensors[name] = tensor.to(device, copy=True)  # aligned memory, which the CPU's int8 product needs
                else:
                    tensors[name] = tensor.to(device, dtype)
    return tensors


def check_tensors(where: object, found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Every tensor of the model is there, in its shape, and nothing else; else a ValueError that names the first."""
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{where}: {missing[0]} is missing, and {len(missing) - 1} more")
    if unknown := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{where}: {unknown[0]} belongs to no part of this model")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(found[name])}, the model {tuple(shape)}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def write_shards(folder: Path, plan: Mapping[str, Tensor], read: Callable[[str], Tensor], limit: int = 2**31) -> None:
    """Safetensors files of at most `limit` bytes and their index. `plan` gives names, shapes and dtypes (meta tensors
    will do), `read` the tensors: memory holds one shard."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, planned in plan.items():
        if groups[-1] and planned.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= planned.nbytes
    weight_map: dict[str, str] = {}
    with tqdm(total=len(plan), desc="convert", unit="tensor", disable=None) as bar:
        for number, names in enumerate(groups, 1):
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = read(name).to(plan[name].dtype).contiguous()
                bar.update()
            save_file(tensors, folder / file)
            weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in plan.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
