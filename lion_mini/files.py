"""The edge: foreign files come in, whole files go out, and every fault becomes one sentence.

with reading(path): ...             whatever is raised in here becomes ValueError("path: reason")
with atomic_write(path) as new: ... the file or folder is there as a whole or not at all
run(main, args)                     a script's way out: one sentence on stderr and exit code 2
"""

import inspect
import io
import json
import os
import pickle
import re
import shutil
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

FAULTS: dict[type | tuple[type, ...], str] = {
    UnicodeDecodeError: "it is not UTF-8 text at byte {0.start}",
    json.JSONDecodeError: "it is not whole JSON: {0.msg}, line {0.lineno}, column {0.colno}",
    RecursionError: "it is nested too deeply",
    KeyError: "the field {0} is missing",
    (TypeError, AttributeError, IndexError): "it has another form than expected: {0}",
    pickle.UnpicklingError: "it is damaged, or holds more than plain data, which could run code, and is refused",
}


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever is raised while foreign data is read into one ValueError, `what: reason`."""
    try:
        if isinstance(what, Path) and what.exists() and not (what.is_file() or what.is_dir()):
            raise ValueError("it is a pipe or a device, not a regular file")  # a pipe may never end
        yield
    except Exception as error:
        text, place = (isinstance(what, Path) and disguise(what)) or reason(error), printable(what)
        raise ValueError(text if text.startswith(place) else f"{place}: {text}") from error


def reason(error: BaseException) -> str:
    """What went wrong, on one line that a terminal can show."""
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    text = next((text for kinds, text in FAULTS.items() if isinstance(error, kinds)), "").format(error)
    said = str(error).strip().split("\n")[0]
    said = said.split(". ")[0] if isinstance(error, RuntimeError) else said  # PyTorch's advice follows
    return printable(text or said or f"it is damaged ({error!r})")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)  # int8 with a scale
CHECKPOINTS = (".pth", ".pt", ".bin", ".safetensors")
SIGNATURES = {  # the ending of a file's name and its first bytes, if they do not belong together
    rb"\.(pth|pt|bin|safetensors|txt) $": "it is empty",
    rb"\S* version https://git-lfs": "it is a Git LFS pointer: git lfs pull fetches the file itself",
    rb"\S* \s*<(!doctype|html|head|body|\?xml|!--)": "it is a web page",
    rb"\S* (\x1f\x8b|7z\xbc|BZh|\xfd7zXZ|.{257}ustar|PK(?!.*data\.pkl))": "it is an archive: unpack it",
    rb"\.(pth|pt|bin) .{6}\0\0\{|\.safetensors PK": "safetensors files must end in .safetensors, PyTorch's in .pth",
    rb"\.(pth|pt|bin|safetensors) [^\0-\x08\x0e-\x1f]*$": "it is text",
}


def disguise(path: Path) -> str:
    """What a file is that has the name of something else; an empty text if it looks right."""
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        return ""
    with open(path, "rb") as file:
        start = path.suffix.lower().encode() + b" " + file.read(512)
    return next((what for form, what in SIGNATURES.items() if re.match(form, start, re.I | re.S)), "")


def printable(text: object) -> str:
    """The text without line breaks, escape sequences and halves of surrogate pairs."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in str(text))


def run(main: Callable[[Any], int | None], args: Any) -> int:
    """Call `main(args)`; returns the exit code. An error is one sentence on stderr; LION_DEBUG=1 adds the traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # the script's, for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # a full disk shows before the end
    try:
        return main(args) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("LION_DEBUG"):
            traceback.print_exc()
        text = reason(error) if isinstance(error, (ValueError, OSError)) else f"{error!r}; LION_DEBUG=1 shows where"
        name = main.__module__.rpartition(".")[0] or Path(inspect.getfile(main)).name
        print(f"{name}: {printable(text)}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is None:
            sys.stdout = None  # perhaps its pipe is closed or its disk full, and Python would complain at exit again
        return 2


def read_text(path: Path) -> str:
    with reading(path):
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path, kind: type | tuple[type, ...] = dict) -> Any:
    with reading(path):
        return need(json.loads(read_text(path)), kind)


_NOT_BLANK = re.compile(r"[^\s\ufeff]")  # files that were joined may hold a byte order mark inside


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON list, or of JSON lines, which may span lines, each with its place: "path, line 3"."""
    text, decoder, start, end, line = read_text(path), json.JSONDecoder(), 0, 0, 1
    while first := _NOT_BLANK.search(text, end):
        line += text.count("\n", start, first.start())
        start = first.start()
        with reading(place := f"{path}, line {line}"):
            value, end = decoder.raw_decode(text, start)
        if isinstance(value, list):
            yield from ((f"{path}, record {number}", row) for number, row in enumerate(value, 1))
        else:
            yield place, value


NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "a boolean"}


def need(value: Any, kind: type | tuple[type, ...], name: str = "it") -> Any:
    """The value if it is of that type, else a ValueError. A bool is no number; an int will do for a float."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(NAMES.get(k, k.__name__) for k in kinds)
        raise ValueError(f"{name} must be {expected}, found {value!r:.60}")
    return value


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a new path beside `path`, for a file or folder, and renames it to `path`. An OSError names `path`."""
    new = path.with_name(f".{path.name}.new")
    with reading(path):  # a rename would replace a device
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        remove(new)  # left by a killed process
        yield new
        sync(new)
        new.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise OSError(0, f"it cannot be written, is the disk full? ({reason(error)})", str(path)) from error
    finally:
        remove(new)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. Files get the umask's mode, because safetensors creates them private."""
    os.umask(mask := os.umask(0))
    for each in (*filter(Path.is_file, path.rglob("*")), path):
        if each.is_file():
            each.chmod(0o666 & ~mask)
        handle = os.open(each, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class Tensors:
    """A checkpoint file, or folder of shards: names and shapes at once, each tensor on request."""

    def __init__(self, path: Path):
        self.where, self.shapes = dict[str, Path](), dict[str, torch.Size]()  # of each tensor
        self._mapped, self._room, self.int8 = dict[str, Tensor](), 0, False
        for file in [path] if path.is_file() else shards(path):
            for name, tensor in read_tensors(file).items():
                if name in self.where:
                    raise ValueError(f"{file}: {name} stands in {self.where[name].name} already")
                self.where[name], self.shapes[name] = file, tensor.shape
                self.int8 |= tensor.dtype == torch.int8
        if not self.where:
            raise ValueError(f"{path}: no such file, no folder with .safetensors files or pytorch_model.bin, or empty")

    def read(self, name: str) -> Tensor:
        """One file is mapped at a time, and anew after 1 GiB, because mapped pages count as memory in use."""
        if name not in self._mapped or self._room < 0:
            self._mapped.clear()
            self._mapped, self._room = read_tensors(self.where[name]), 2**30
        tensor = self._mapped[name]
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{self.where[name]}: {name} must hold floats, not {tensor.dtype}")
        self._room -= tensor.nbytes
        return tensor


def shards(folder: Path) -> list[Path]:
    """A folder's checkpoint files. An index beside them must name no others."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for index in folder.glob(f"*{files[0].suffix}.index.json") if files else ():
        with reading(index):
            for name in need(read_json(index)["weight_map"], dict, "weight_map").values():
                if Path(need(name, str, "a file name")).name != name or not (folder / name).exists():
                    raise ValueError(f"it names {name!r:.99}, which is no file of its folder")
    return files


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, memory-mapped unless it has torch's old format. No code in it can run."""
    if file.suffix not in CHECKPOINTS:
        raise ValueError(f"{file}: a checkpoint is a .pth, .pt, .bin or .safetensors file, not {file.suffix!r}")
    with reading(file), warnings.catch_warnings(action="ignore"):  # PyTorch's about old formats
        file.open("rb").close()  # safetensors says that a file without permission is not there
        with reading("it is not a whole checkpoint"):
            if file.suffix == ".safetensors":
                tensors = load_file(file)
            else:
                data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
                tensors = data["model"] if isinstance(need(data, dict).get("model"), dict) else data
        for name, tensor in tensors.items():
            if not need(name, str, "a name").isprintable():
                raise ValueError(f"the name {name!r:.99} cannot be printed")
            dense = need(tensor, Tensor, name).layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
            if not dense or tensor.is_complex() or tensor.is_quantized:
                raise ValueError(f"{name} is sparse, nested, complex, quantised or without values, and is refused")
        return tensors


def read_folder(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every tensor, int8 as it is and floats as `dtype` (None: as stored, and on the CPU memory-mapped).

    A folder with int8 is copied: the CPU's product needs aligned memory, and a mapped tensor keeps its file in memory.
    """
    source, tensors = Tensors(folder), dict[str, Tensor]()
    for name in source.where:
        tensor = source.read(name)
        tensors[name] = tensor.to(device, None if tensor.dtype == torch.int8 else dtype, copy=source.int8)
    return tensors


def check_tensors(where: object, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare with the model's names and shapes. A ValueError names the first that is missing, unknown or different."""
    for name in sorted(found.keys() | expected.keys()):
        both = [of.get(name) for of in (found, expected)]
        kinds = ["missing" if t is None else f"{tuple(t.shape)}{' in int8' * (t.dtype == torch.int8)}" for t in both]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{where}: {name} is {kinds[0]} here and {kinds[1]} in the model")


def write_shards(folder: Path, plan: Mapping[str, Tensor], read: Callable[[str], Tensor], limit: int = 2**30) -> None:
    """Safetensors files of about `limit` bytes and their index. `plan` has shapes and dtypes, `read` has the values."""
    numbers = [(end - 1) // limit + 1 for end in accumulate(tensor.nbytes for tensor in plan.values())]
    weight_map = {name: f"model-{n:05}-of-{numbers[-1]:05}.safetensors" for name, n in zip(plan, numbers, strict=True)}
    for file, names in groupby(tqdm(plan, desc="convert", unit="tensor", disable=None), weight_map.__getitem__):
        tensors = {}
        for name in names:  # copies: safetensors refuses tensors that share memory
            tensors[name] = read(name).to(plan[name].dtype, copy=True, memory_format=torch.contiguous_format)
        save_file(tensors, folder / file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in plan.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
