"""The edge: one sentence for what is wrong, and files that are whole or not there."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from lion_mini.files import Tensors, atomic_write, check_tensors, json_lines, need, read_json, read_text, reading, run


def test_reading_names_the_innermost_place_once() -> None:
    with pytest.raises(ValueError, match=r"^a.json, line 3: the field 'box' is missing$"), reading("a.json"):  # noqa: SIM117
        with reading("a.json, line 3"):
            raise KeyError("box")
    with pytest.raises(ValueError, match=r"^a.json: b\?\[31m: evil \? name$"), reading("a.json"), reading("b\x1b[31m"):
        raise RuntimeError("evil\t\ud800 name\nand much more")


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data, words in (
        (b"\xff", "it is not UTF-8 text at byte 0"),
        (b'{"a": [1, 2', "it is not whole JSON: Expecting ',' delimiter, line 1, column 12"),
        (b"[" * 10**5, "it is nested too deeply"),
        (b"[1]", "it must be an object, found [1]"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r".") as caught:
            read_json(path)
        assert str(caught.value) == f"{path}: {words}"
    path.write_bytes(b'\xef\xbb\xbf1\n\n{"a": 2}\n{"a":')
    rows = json_lines(path)
    assert [next(rows), next(rows)] == [(f"{path}, line 1", 1), (f"{path}, line 3", {"a": 2})]
    with pytest.raises(ValueError, match="line 4: it is not whole JSON"):
        next(rows)
    assert need(3, float) == 3
    for value, kind in ((True, int), (True, float), (1.5, int), (None, (str, list))):
        with pytest.raises(ValueError, match="box must be"):
            need(value, kind, "box")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3132668804\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title>"
COMPLEX = (64).to_bytes(8, "little") + b'{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}'.ljust(64) + bytes(8)
GZIP = b"\x1f\x8b\x08\0" + bytes(20)


@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x.safetensors", "tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "(empty|not whole JSON)"),
        (LFS, "a Git LFS pointer"),
        (PAGE, "a web page"),
        (b"\n <html>", "a web page"),
        (GZIP, "an archive"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (path := tmp_path / name).write_bytes(data)
    read: Any = {".json": read_json, ".txt": lambda path: int(path.read_text(errors="replace"))}.get(
        path.suffix, Tensors
    )
    with pytest.raises(ValueError, match=f"{name}: it is {words}"), reading(path):
        read(path)


def dump(data: object) -> Any:
    return lambda path: torch.save(data, path)


def odd(name: str) -> Any:
    """A checkpoint of one tensor that is no plain one."""
    plain = torch.ones(2, 2)
    kinds: dict[str, Any] = {
        "sparse": plain.to_sparse, "csr": plain.to_sparse_csr, "meta": lambda: plain.to("meta"),
        "complex": lambda: plain * 1j, "quantised": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }  # fmt: skip
    return lambda path: torch.save({"a": kinds[name]()}, path)


def tar(path: Path) -> None:
    path.write_bytes(bytes(257) + b"ustar" + bytes(300))


def script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("eva_vit_g.pth", b"x")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("x.pth", lambda path: path.write_bytes(b"x"), "it is text"),
        ("x.pth", lambda path: path.write_bytes(b"\0"), "it is not a whole checkpoint"),
        ("x.pth", lambda path: path.write_text("a text\n" * 99), "it is text"),
        ("x.safetensors", lambda path: path.write_text("a text\n" * 99), "it is text"),
        ("x.bin", lambda path: path.write_text('{"error": "not found"}'), "it is text"),
        ("x.pth", other_zip, "it is an archive: unpack it"),
        ("x.pth", tar, "it is an archive: unpack it"),
        ("x.pth", script, "it is not a whole checkpoint: Cannot use"),
        ("x.safetensors", dump({"a": torch.ones(1)}), "safetensors files must end in .safetensors, PyTorch's in .pth"),
        ("x.pth", lambda path: save_file({"a": torch.ones(1)}, path), "PyTorch's in .pth"),
        (
            "x.safetensors",
            lambda path: path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
            "not a whole",
        ),
        ("x.pth", dump(torch.nn.Linear(1, 1)), "could run code, and is refused"),
        ("x.pth", dump([torch.ones(1)]), "it must be an object, found"),
        ("x.pth", dump({}), "no such file, no folder with .safetensors files or pytorch_model.bin, or empty"),
        ("x.pth", dump({3: torch.ones(1)}), "a name must be text, found 3"),
        ("x.pth", dump({"model": {"a": {"b": torch.ones(1)}}}), "a must be Tensor, found {'b'"),
        ("x.pth", dump({"a\x1b[31m": torch.ones(1)}), r"the name 'a\x1b[31m' cannot be printed"),
        ("x.safetensors", lambda path: save_file({"a\nb": torch.ones(1)}, path), r"the name 'a\nb' cannot be printed"),
        *(("x.pth", odd(name), "a is sparse, nested, complex, quan") for name in ("sparse", "csr", "meta", "complex")),
        *(("x.pth", odd(name), "a is sparse, nested, complex, quantised or") for name in ("quantised", "nested")),
        ("x.safetensors", lambda path: path.write_bytes(COMPLEX), ": "),  # Before 0.7 safetensors itself refuses it.
    ],
)
def test_a_checkpoint_that_is_none(tmp_path: Path, name: str, make: Any, words: str) -> None:
    """One sentence; PyTorch's advice to allow code is not repeated."""
    make(path := tmp_path / name)
    with pytest.raises(ValueError, match=r".") as caught:
        Tensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert not any(part in str(caught.value) for part in ("Re-running", "weights_only` set", "\n", "\x1b"))


def test_a_tensor_of_another_kind(tmp_path: Path) -> None:
    """Whole numbers may be there, as buffers are, but nothing reads them as weights."""
    save_file({"a": torch.ones(2, dtype=torch.int64), "b": torch.ones(2)}, path := tmp_path / "x.safetensors")
    assert Tensors(path).read("b").tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"x.safetensors: a must hold floats, not torch.int64"):
        Tensors(path).read("a")
    with pytest.raises(ValueError, match=r"x: a is \(2,\) in int8 here and \(2,\) in the model"):
        check_tensors("x", {"a": torch.ones(2, dtype=torch.int8)}, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            {"weight_map": {"a": "../../x.safetensors"}},
            "it names '../../x.safetensors', which is no file of its folder",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "it names '/etc/passwd', which is no file of its folder"),
        ({"weight_map": {"a": "..\x1b[31m/"}}, r"it names '..\x1b[31m/', which is no file of its folder"),
        ({"weight_map": ["a"]}, "weight_map must be an object, found ['a']"),
        ({"weight_map": {"a": 3}}, "a file name must be text, found 3"),
        ({"weight_map": {"a": "lost.safetensors"}}, "it names 'lost.safetensors', which is no file of its folder"),
        ({}, "the field 'weight_map' is missing"),
        ([], "it must be an object, found []"),
        ("[" * 10**5, "it is nested too deeply"),
    ],
)
def test_an_index_names_the_files_beside_it(tmp_path: Path, index: Any, words: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (path := tmp_path / "model.safetensors.index.json").write_text(
        index if isinstance(index, str) else json.dumps(index)
    )
    with pytest.raises(ValueError, match=r".") as caught:
        Tensors(tmp_path)
    assert str(caught.value) == f"{path}: {words}"
    path.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert Tensors(tmp_path).shapes == {"a": (1,)}


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.safetensors", "pytorch_model.bin"])
def test_a_pipe_is_no_file(tmp_path: Path, name: str) -> None:
    """Reading one would wait for ever, and a rename would replace it."""
    os.mkfifo(path := tmp_path / name)
    read: Any = {".txt": read_text, ".json": read_json}.get(path.suffix, lambda path: Tensors(path.parent))
    for use in (read, lambda path: atomic_write(path).__enter__()):
        with pytest.raises(ValueError, match=f"{name}: it is a pipe or a device, not a regular file"):
            use(path)
    assert path.is_fifo()
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{name}: No such file"):
        read(path)


SCRIPTS = [
    "train.py --quick --out run",
    "infer.py",
    "eval.py",
    "weights.py inspect tiny",
    "-m lion_mini.data inspect x",
]


@pytest.mark.parametrize("command", [*SCRIPTS, "-m lion_mini.toy"])
def test_ctrl_c_leaves_no_traceback(tmp_path: Path, command: str) -> None:
    """Also while PyTorch is imported, which takes most of these times."""
    first, *rest = command.split()
    argv = [sys.executable, str(ROOT / first) if first.endswith(".py") else first, *rest]
    started = []
    for _ in range(3):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(argv, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
    for process, pause in zip(started, (0.3, 0.5, 0.7), strict=True):  # 0.3, 0.8 and 1.5 s after the start
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
    for process in started:
        assert "Traceback" not in process.communicate(timeout=100)[1]
        assert process.returncode in (-signal.SIGINT, 130, 0, 2)


def test_ctrl_c_is_handled_again_after_the_imports() -> None:
    """A script gives SIGINT to the system while it imports. `run` takes it back before anything else."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)

    def main(_: None) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # or the signal would end the tests
        signal.raise_signal(signal.SIGINT)

    try:
        assert run(main, None) == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("out", "words"), [("/dev/full", "No space left on device"), (None, "Broken pipe")])
def test_nobody_reads_stdout(tmp_path: Path, out: str | None, words: str) -> None:
    """One sentence, at once: Python itself would find out at exit, after the exit code."""
    (script := tmp_path / "say.py").write_text("""import sys
from lion_mini import files
def main(_):
    print("said")
sys.exit(files.run(main, 0))""")
    read, write = os.pipe()
    os.close(read)
    with open(out or write, "w") as stdout:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script)]
        done = subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, f"say.py: {words}\n")


def test_run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(error: BaseException) -> None:
        raise error

    for error, code, text in (
        (KeyboardInterrupt(), 130, ""),
        (ValueError("a.json: bad\nTraceback"), 2, "test_files.py: a.json: bad\n"),
        (FileNotFoundError(2, "No such file", "b"), 2, "test_files.py: b: No such file\n"),
        (KeyError("x"), 2, "test_files.py: KeyError('x'); LION_DEBUG=1 shows where\n"),
    ):
        assert run(main, error) == code
        assert capsys.readouterr().err == text
    monkeypatch.setenv("LION_DEBUG", "1")
    assert run(main, ValueError("bad")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_names_the_path(tmp_path: Path) -> None:
    path, tensors = tmp_path / "out", {"a": torch.zeros(1000)}
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (
        lambda new: new.write_bytes(bytes(2000)),
        lambda new: torch.save(tensors, new),
        lambda new: save_file(tensors, new),
        lambda new: save_file(tensors, new.mkdir() or new / "a"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may be larger
        try:
            with pytest.raises(OSError, match=str(path)) as caught, atomic_write(path) as new:
                write(new)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(path)
        assert [one.name for one in tmp_path.iterdir()] == ["out"]
        assert path.read_text() == "before"


def test_atomic_write(tmp_path: Path) -> None:
    (tmp_path / ".out.new" / "left").mkdir(parents=True)  # by a killed process
    with atomic_write(tmp_path / "out") as new:
        new.mkdir()
        save_file({"a": torch.ones(1)}, new / "a.safetensors")
    os.umask(mask := os.umask(0))
    assert (tmp_path / "out" / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(OSError, match="not empty"), atomic_write(tmp_path / "out") as new:
        new.mkdir()
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "deep" / "file") as new:  # noqa: PT012
        new.symlink_to(tmp_path / "out")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="elsewhere: No such file"), atomic_write(tmp_path / "file"):
        (tmp_path / "elsewhere").read_text()
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["a.safetensors", "deep", "out"]
