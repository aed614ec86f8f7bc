"""Tensors on disk: safetensors and torch files, whole or in shards, read one at a time and written aside first.

Whatever is wrong with a file is a ValueError in one sentence that names it. A torch file is unpickled by the restricted
reader only, so that nothing in it can run. Both kinds are mapped, not read: memory holds what is asked for.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}


class Tensors:
    """A checkpoint file, or folder of shards, of which only names and shapes are read before a tensor is asked for."""

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None):
        self.path = path
        self.where: dict[str, tuple[Path, str]] = {}  # by today's name: file, and name in the file
        self.shapes: dict[str, torch.Size] = {}
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        self._mapped = 0
        for file in shards(path):
            for theirs, shape in self._shapes(file):
                name = theirs
                for old, new in (renamed or {}).items():
                    name = name.replace(old, new)
                if name in self.where:
                    raise ValueError(f"{file}: {name} stands in {self.where[name][0].name} already")
                self.where[name], self.shapes[name] = (file, theirs), shape

    def _shapes(self, file: Path) -> Iterator[tuple[str, torch.Size]]:
        if file.suffix == ".safetensors":
            with opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118
                    yield name, torch.Size(handle.get_slice(name).get_shape())
        else:
            for name, tensor in self._pickle(file).items():
                yield name, tensor.shape

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        if file not in self._pickles:
            self._pickles[file] = unpickled(file)
        return self._pickles[file]

    def read(self, name: str) -> Tensor:
        file, theirs = self.where[name]
        if file.suffix == ".safetensors":
            with opened(file) as handle:
                return handle.get_tensor(theirs)
        self._mapped += self.shapes[name].numel()
        if self._mapped > 2**28:  # pages of a mapped file count as memory in use: let them go now and then
            self._pickles.clear()
            self._mapped = 0
        return self._pickle(file)[theirs]


def shards(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or those that the folder's index or the usual names point to."""
    if path.is_file():
        if path.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
            raise ValueError(f"{path}: a checkpoint is a .pth, .pt, .bin or .safetensors file, not {path.suffix!r}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (path / f"{stem}.index.json").is_file():
            names = sorted(set(read_json(path / f"{stem}.index.json").get("weight_map", {}).values()))
            missing = [name for name in names if not (path / name).is_file()]
            if missing or not names:
                raise ValueError(f"{path / stem}.index.json names {missing or 'no file'}, which is not there")
            return [path / name for name in names]
        if (path / stem).is_file():
            return [path / stem]
    raise ValueError(f"{path} holds no model.safetensors, no pytorch_model.bin and no index of shards")


def opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, mapped rather than read where its format allows it; nothing in it can run."""
    try:
        try:
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            data = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"{file} holds more than tensors, which could run code, and is refused: {why}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is not a whole torch checkpoint: {str(error).strip().split(chr(10))[0]}") from None
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{file} holds a {type(data).__name__}, not a dictionary of tensors")
    strange = [name for name, value in data.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{file}: {strange[0]!r} is a {type(data[strange[0]]).__name__}, not a tensor")
    return data


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, found a {type(data).__name__}")
    return data


class Undrawn(TorchFunctionMode):
    """Layers that are made in here, on the meta device, get shapes, and no numbers are drawn for them: PyTorch would
    load its compiler for that, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = func in (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)
        return kwargs["tensor"] if draws else func(*args, **kwargs)


def read_shards(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, int8 as it is and all others as `dtype`. On the CPU and in the
    stored dtype they are not read yet but mapped, each for itself: the first use of one brings it in from the disk, the
    operating system may share or drop its pages, and it goes when nobody needs it any more."""
    tensors: dict[str, Tensor] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no .safetensors file")
    for path in paths:
        for name, tensor in mapped(path):
            if name in tensors:
                raise ValueError(f"{path}: {name} stands in another shard too")
            tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    return tensors


def mapped(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file, each tensor a private mapping of its own bytes.

    The library's reader maps the whole file, so that no tensor could go before all do; asked for each tensor anew, it
    reads the header 2,403 times for XL, which takes seconds.
    """
    opened(path)  # says whether the file is whole
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    dtypes = {code: dtype for dtype, code in CODES.items()}
    for name, about in header.items():
        if about["dtype"] not in dtypes:
            kinds = ", ".join(dtypes)
            raise ValueError(f"{path}: {name} is of type {about['dtype']}, not one of {kinds}: convert it again")
        start, end = about["data_offsets"]
        data = np.memmap(path, np.uint8, "c", 8 + length + start, (end - start,))
        yield name, torch.from_numpy(data).view(dtypes[about["dtype"]]).reshape(about["shape"])


def read_ahead(folder: Path) -> None:
    """Bring the folder's tensors into the operating system's cache in the order in which they lie on the disk, while
    others already work with them: a first use that must wait for the disk brings in a few pages at a time."""

    def sweep(path: Path) -> None:
        room = bytearray(2**20)
        with suppress(OSError), path.open("rb", buffering=0) as file:  # who needs the bytes will say what is wrong
            while file.readinto(room):
                pass

    for path in folder.glob("*.safetensors"):
        Thread(target=sweep, args=[path], daemon=True).start()


def check_tensors(where: object, found: dict[str, torch.Size], expected: dict[str, torch.Size]) -> None:
    """Every tensor of the model is there, in its shape, and nothing else; else a ValueError that names the first."""
    for name in sorted(expected.keys() - found.keys()):
        raise ValueError(f"{where}: {name} is missing, and {len(expected.keys() - found.keys()) - 1} more")
    for name in sorted(found.keys() - expected.keys()):
        raise ValueError(f"{where}: {name} belongs to no part of this model")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(found[name])}, the model {tuple(shape)}")


def write_shards(folder: Path, plan: Mapping[str, Tensor], read: Callable[[str], Tensor], limit: int = 2**32) -> None:
    """Safetensors files of at most `limit` bytes and their index, written tensor by tensor; `plan` tells shapes and
    dtypes and may be on the meta device. Tensors of whole blocks of 64 bytes come first: mapped, they begin at one."""
    plan = dict(sorted(plan.items(), key=lambda item: item[1].nbytes % 64 > 0))
    groups: list[list[str]] = [[]]
    room = limit
    for name, planned in plan.items():
        if groups[-1] and planned.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= planned.nbytes
    weight_map = {}
    bar = tqdm(total=len(plan), desc="convert", unit="tensor", disable=None)
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        header, end = {}, 0
        for name in names:
            start, end = end, end + plan[name].nbytes
            code, shape = CODES[plan[name].dtype], list(plan[name].shape)
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                out.write(read(name).to(plan[name].dtype).contiguous().flatten().view(torch.uint8).numpy().data)
                bar.update()
    bar.close()
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in plan.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


@dataclass
class Aside:
    """A path to write to; it takes its place when all is well, and is removed when not."""

    out: Path

    def __enter__(self) -> Path:
        if self.out.exists():
            raise ValueError(f"--out {self.out} exists already: remove it or choose another")
        self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        self.aside = self.out.with_name(f".{self.out.name}.{os.getpid()}")
        return self.aside

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.aside.rename(self.out)
        elif self.aside.is_dir():
            shutil.rmtree(self.aside)
        else:
            self.aside.unlink(missing_ok=True)


def read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    lines = [line.strip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def to_float(line: str, path: Path, number: int) -> float:
    try:
        return float(line)
    except ValueError:
        raise ValueError(f"{path} line {number}: expected a number, found {line!r}") from None
