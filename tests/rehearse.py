"""The port at its real size, without the official files: random weights under every official name.

    LION_ASSETS=… python tests/rehearse.py --size xl

It writes the five files as they are published: names and shapes from tests/keys, the ViT in float16, FlanT5 in float32
and two shards, the rest in float32. It converts them to bfloat16 and to int8, opens each result, and asks it about a
photo. Each step is a process of its own. Printed are its seconds, its peak of resident memory, and the bytes on disk;
and how long the first answer takes beside reading all bytes once. The vocabularies and the photo come from LION_ASSETS.
XL needs 40 GB of disk.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lion_mini.config import PRESETS  # noqa: E402
from lion_mini.files import write_shards  # noqa: E402

FILES = {"eva": "eva_vit_g.pth", "lion": "LION.pth", "ram": "ram_swin_large_14m.pth"}
TAGS = ("ram_tag_list.txt", "ram_tag_list_threshold.txt")


def manifest(name: str) -> dict[str, torch.Size]:
    """Names and shapes of an official file."""
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


def write(size: str, folder: Path) -> None:
    """The official files."""
    assets = Path(os.environ["LION_ASSETS"])
    torch.manual_seed(0)
    manifests = {"eva": "eva_vit_g_39_blocks", "ram": "ram_swin_large_14m", "lion": f"lion_flant5_{size}_trainable"}
    for kind, name in manifests.items():
        tensors = {k: value(k, s).half() if kind == "eva" else value(k, s) for k, s in manifest(name).items()}
        torch.save(tensors if kind == "eva" else {"model": tensors}, folder / FILES[kind])
        del tensors
    t5, bert, config = folder / "t5", folder / "bert", PRESETS[size].t5
    t5.mkdir()
    bert.mkdir()
    shapes = {k: s for k, s in manifest(f"flan_t5_{size}").items() if "embed_tokens" not in k}
    plan = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    half = sum(tensor.nbytes for tensor in plan.values()) // 2 + 2**28
    write_shards(t5, plan, lambda name: value(name, shapes[name]), limit=half)
    sizes = {
        "d_model": config.width, "d_kv": config.head_width, "num_heads": config.heads, "d_ff": config.mlp_width,
        "num_layers": config.encoder_depth, "num_decoder_layers": config.decoder_depth, "vocab_size": config.vocab_size,
    }  # fmt: skip
    (t5 / "config.json").write_text(json.dumps(sizes))
    shutil.copy(assets / "t5_tokenizer.json", t5 / "tokenizer.json")
    shutil.copy(assets / "bert_vocab.txt", bert / "vocab.txt")
    for name in TAGS:
        shutil.copy(assets / name, folder)


def read(folder: Path) -> float:
    """Seconds to read all its bytes once from the disk. Leaves none of them in the page cache."""
    evict(folder)
    start, buffer = time.perf_counter(), bytearray(2**24)
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    seconds = time.perf_counter() - start
    evict(folder)
    return seconds


def evict(folder: Path) -> None:
    """Drop its files from the page cache, as after a restart."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files(folder: Path) -> list[Path]:
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
    size = sum(path.stat().st_size for path in files(written)) / 1e9
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
        return write(args.size, args.folder)
    if args.step == "answer":
        return answer(args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        official, me = Path(name) / "official", ["tests/rehearse.py", "--size", args.size]
        official.mkdir()
        step("write", [*me, "--step", "write", "--folder", official], official)
        command = [
            "weights.py", "convert", "--vit", official / FILES["eva"], "--t5", official / "t5",
            "--bert", official / "bert", "--ram", official / FILES["ram"], "--ram-tags", official / TAGS[0],
            "--ram-thresholds", official / TAGS[1], "--lion", official / FILES["lion"],
        ]  # fmt: skip
        for dtype in ("bfloat16", "int8"):
            out = Path(name) / dtype
            step(f"convert, {dtype}", [*command, "--out", out, "--dtype", dtype], out)
            ratio = step(f"answer, {dtype}", [*me, "--step", "answer", "--folder", out], out)
            print(f"answer, {dtype}: the peak of loading and answering is {ratio:.3f} x the model's bytes on disk")
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
