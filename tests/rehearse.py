"""The port at its real size, without the official files: random weights under every official name.

    LION_ASSETS=… python tests/rehearse.py --size xl

It writes the five files as they are published: names and shapes from tests/keys, the ViT in float16, FlanT5 in float32
and two shards, the rest in float32. It converts them to bfloat16 and to int8, opens each result, and asks it about a
photo. Each step is a process of its own. Printed are its seconds, its peak of resident memory, and the bytes on disk;
and how long the first answer takes beside reading all bytes once. The vocabularies and the photo come from LION_ASSETS.
XL needs 40 GB of disk.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lion_mini.files import write_shards  # noqa: E402
from lion_mini.text.vocabularies import Vocabularies  # noqa: E402

Manifest = dict[str, torch.Size]  # names and shapes of an official file


def manifest(name: str) -> Manifest:
    lines = (ROOT / "tests" / "keys" / f"{name}.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {name: torch.Size(map(int, shape[0].split("x")) if shape else []) for name, *shape in rows}


def value(name: str, shape: torch.Size) -> Tensor:
    """Random, so that signals stay of order one: matrices by fan-in, norms near one, biases near zero."""
    if name.endswith(("position_ids", "position_index")):
        return torch.zeros(shape, dtype=torch.long)
    if len(shape) > 1:
        return torch.randn(shape) / shape[1:].numel() ** 0.5
    return torch.randn(shape) * 0.02 + float("norm" in name.lower() and name.endswith("weight"))


def manifests(size: str) -> dict[str, Manifest]:
    """Those of the real files, without T5's copies of its embeddings."""
    names = {"vit": "eva_vit_g_39_blocks", "ram": "ram_swin_large_14m", "lion": f"lion_flant5_{size}_trainable"}
    t5 = {name: shape for name, shape in manifest(f"flan_t5_{size}").items() if "embed_tokens" not in name}
    return {kind: manifest(name) for kind, name in names.items()} | {"t5": t5}


def write(files: dict[str, Manifest], texts: Sequence[Path], folder: Path) -> None:
    """Official files. `texts` are those of `Vocabularies.FILES`."""
    torch.manual_seed(0)
    for kind in ("vit", "ram", "lion"):
        tensors = {k: value(k, s).half() if kind == "vit" else value(k, s) for k, s in files[kind].items()}
        torch.save(tensors if kind == "vit" else {"model": tensors}, folder / f"{kind}.pth")
        del tensors
    plan = {name: torch.empty(shape, device="meta") for name, shape in files["t5"].items()}
    half = sum(tensor.nbytes for tensor in plan.values()) // 2 + 2**28
    write_shards(folder, plan, lambda name: value(name, plan[name].shape), limit=half)
    for path, name in zip(texts, Vocabularies.FILES, strict=True):
        shutil.copy(path, folder / name)


def conversion(folder: Path) -> list[object]:
    """The command that converts what `write` wrote: T5 and BERT share the folder."""
    tags, thresholds = (folder / name for name in Vocabularies.FILES[2:])
    return [
        "weights.py", "convert", "--vit", folder / "vit.pth", "--t5", folder, "--bert", folder,
        "--ram", folder / "ram.pth", "--ram-tags", tags, "--ram-thresholds", thresholds, "--lion", folder / "lion.pth",
    ]  # fmt: skip


def read(folder: Path) -> float:
    """Seconds to read all its bytes once from the disk. Leaves none of them in the page cache."""
    evict(folder)
    start, buffer = time.perf_counter(), bytearray(2**24)
    for path in paths(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    seconds = time.perf_counter() - start
    evict(folder)
    return seconds


def evict(folder: Path) -> None:
    """Drop its files from the page cache, as after a restart."""
    for path in paths(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def paths(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def answer(folder: Path) -> None:
    """Open the model, answer a question twice, locate an object. The first answer's extra time belongs to the start."""
    from lion_mini import GENERATION, Lion
    from lion_mini.images import open_image
    from lion_mini.text.prompts import EVAL_TEMPLATES, render

    once = read(folder)
    start = time.perf_counter()
    lion = Lion.from_pretrained(folder, dtype=None)
    opened = time.perf_counter() - start
    print(f"  opened in {opened:.1f} s, peak {peak():.2f} GB", flush=True)
    photo = open_image(sorted((Path(os.environ["LION_ASSETS"]) / "photos").iterdir())[0])
    question = "answer", render(EVAL_TEMPLATES["vqa"], question="what is the man holding?"), "image"
    box = "locate", render(EVAL_TEMPLATES["rec"], expression="the dog on the left"), "region"
    seconds = []
    for kind, prompt, task in (question, question, box):
        start = time.perf_counter()
        reply = lion.respond([photo], [prompt], [task], GENERATION[kind])[0]
        seconds.append(time.perf_counter() - start)
        text = f"{reply.text[:60]!r}, score {reply.score:.2f}, {len(reply.tags)} tags"
        print(f"  {kind} in {seconds[-1]:.1f} s, peak {peak():.2f} GB: {text}", flush=True)
    first = opened + seconds[0] - seconds[1]
    print(f"  the start took {first:.1f} s, {first / once:.2f} x the {once:.1f} s of reading all bytes", flush=True)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step(name: str, command: list[object], written: Path) -> float:
    """Run one process and print its figures. Returns its peak memory over the bytes on disk."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, most = time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9
    if status:
        sys.exit(f"{name} failed with exit code {os.waitstatus_to_exitcode(status)}")
    size = sum(path.stat().st_size for path in paths(written)) / 1e9
    print(f"{name:18} {seconds:8.0f} s   peak {most:6.2f} GB   {size:6.2f} GB on disk", flush=True)
    return most / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["xl", "xxl"], default="xl")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--step", choices=["write", "answer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "LION_ASSETS" not in os.environ:
        sys.exit("rehearse.py: set LION_ASSETS to the folder with the real vocabularies and photos/")
    if args.step == "write":
        names = ("bert_vocab.txt", "t5_tokenizer.json", "ram_tag_list.txt", "ram_tag_list_threshold.txt")
        texts = [Path(os.environ["LION_ASSETS"]) / name for name in names]
        return write(manifests(args.size), texts, args.folder)
    if args.step == "answer":
        return answer(args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        official, me = Path(name) / "official", ["tests/rehearse.py", "--size", args.size]
        official.mkdir()
        step("write", [*me, "--step", "write", "--folder", official], official)
        for dtype in ("bfloat16", "int8"):
            out = Path(name) / dtype
            step(f"convert, {dtype}", [*conversion(official), "--out", out, "--dtype", dtype], out)
            ratio = step(f"answer, {dtype}", [*me, "--step", "answer", "--folder", out], out)
            print(f"answer, {dtype}: the peak of loading and answering is {ratio:.3f} x the model's bytes on disk")
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
