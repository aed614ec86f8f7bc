"""The port at its real size, without the official files: random weights under every official name.

    LION_ASSETS=… python tests/rehearse.py --size xl

writes the five files as they are published (names and shapes from tests/keys, ViT in float16, FlanT5 in float32 and two
shards, the rest in float32), converts them to bfloat16 and to int8, opens the results, packed and plain, and asks them
about a photo. Each step is a process of its own; printed are its seconds, its peak of resident memory and the bytes
that it wrote, and how long the beginning takes beside reading the bytes once. The vocabularies and the photo come from
LION_ASSETS. XL needs 40 GB of disk.
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
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lion_mini.config import PRESETS  # noqa: E402
from lion_mini.files import write_shards  # noqa: E402

FILES = {"eva": "eva_vit_g.pth", "lion": "LION.pth", "ram": "ram_swin_large_14m.pth"}


def manifest(name: str) -> dict[str, torch.Size]:
    lines = (ROOT / "tests" / "keys" / f"{name}.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {name: torch.Size(map(int, shape[0].split("x")) if shape else []) for name, *shape in rows}


def value(name: str, shape: torch.Size) -> Tensor:
    """A tensor that keeps signals of order one on their way: matrices by fan-in, norms near one, biases near zero."""
    if name.endswith(("position_ids", "position_index")):
        return torch.zeros(shape, dtype=torch.long)
    if len(shape) > 1:
        return torch.randn(shape) / shape[1:].numel() ** 0.5
    norm = "norm" in name.lower() and name.endswith("weight")
    return torch.randn(shape) * 0.02 + float(norm)


def write(size: str, folder: Path) -> None:
    """The official layout."""
    assets = Path(os.environ["LION_ASSETS"])
    torch.manual_seed(0)
    for kind, name in (
        ("eva", "eva_vit_g_39_blocks"),
        ("ram", "ram_swin_large_14m"),
        ("lion", f"lion_flant5_{size}_trainable"),
    ):
        tensors = {k: value(k, s) for k, s in manifest(name).items()}
        if kind == "eva":
            tensors = {k: v.half() for k, v in tensors.items()}
        torch.save(tensors if kind == "eva" else {"model": tensors}, folder / FILES[kind])
        del tensors
    t5, config = folder / "t5", PRESETS[size].t5
    t5.mkdir()
    plan = {k: s for k, s in manifest(f"flan_t5_{size}").items() if "embed_tokens" not in k}
    half = sum(shape.numel() for shape in plan.values()) * 4 // 2 + 2**28
    layout = {name: torch.empty(shape, device="meta") for name, shape in plan.items()}
    write_shards(t5, layout, lambda name: value(name, plan[name]), limit=half)
    sizes = {
        "d_model": config.width, "d_kv": config.head_width, "num_heads": config.heads, "d_ff": config.mlp_width,
        "num_layers": config.encoder_depth, "num_decoder_layers": config.decoder_depth, "vocab_size": config.vocab_size,
    }  # fmt: skip
    (t5 / "config.json").write_text(json.dumps(sizes))
    shutil.copy(assets / "t5_tokenizer.json", t5 / "tokenizer.json")
    (folder / "bert").mkdir()
    shutil.copy(assets / "bert_vocab.txt", folder / "bert" / "vocab.txt")
    for name in ("ram_tag_list.txt", "ram_tag_list_threshold.txt"):
        shutil.copy(assets / name, folder)


def forget(folder: Path) -> None:
    """Its files are on the disk alone again, as after a restart."""
    for path in walk(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> float:
    """Seconds to read all its bytes once."""
    forget(folder)
    start, room = time.perf_counter(), bytearray(2**24)
    for path in walk(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return time.perf_counter() - start


def answer(folder: Path, packed: bool) -> None:
    """Open the model, answer a question twice, locate a thing. What the first answer takes longer is what it costs
    to begin."""
    from lion_mini import GENERATION, Lion
    from lion_mini.images import open_image
    from lion_mini.text.prompts import EVAL_TEMPLATES, render

    once = read(folder)
    forget(folder)
    start = time.perf_counter()
    model = Lion.from_pretrained(folder, dtype=None, packed=packed)
    opened = time.perf_counter() - start
    print(f"  opened in {opened:.1f} s, peak {peak():.2f} GB", flush=True)
    photo = open_image(sorted((Path(os.environ["LION_ASSETS"]) / "photos").iterdir())[0])
    question = "answer", render(EVAL_TEMPLATES["vqa"], question="what is the man holding?"), "image"
    box = "locate", render(EVAL_TEMPLATES["rec"], expression="the dog on the left"), "region"
    seconds = []
    for kind, prompt, task in (question, question, box):
        start = time.perf_counter()
        reply = model.respond([photo], [prompt], [task], GENERATION[kind])[0]
        seconds.append(time.perf_counter() - start)
        print(
            f"  {kind} in {seconds[-1]:.1f} s, peak {peak():.2f} GB: {reply.text[:60]!r}, score {reply.score:.2f}, "
            f"{len(reply.tags)} tags",
            flush=True,
        )
    begun = opened + seconds[0] - seconds[1]
    print(f"  to begin took {begun:.1f} s, {begun / once:.2f} x the {once:.1f} s of reading all bytes once", flush=True)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step(name: str, command: list[str], written: Path) -> tuple[float, float, float]:
    """Seconds, peak memory and bytes of one process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{name} failed with exit code {os.waitstatus_to_exitcode(status)}")
    size = sum(path.stat().st_size for path in walk(written))
    print(
        f"{name:18} {seconds:8.0f} s   peak {usage.ru_maxrss / 1e6 * 1.024:6.2f} GB   {size / 1e9:6.2f} GB on disk",
        flush=True,
    )
    return seconds, usage.ru_maxrss * 1024 / 1e9, size / 1e9


def walk(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["xl", "xxl"], default="xl")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--step", choices=["write", "answer", "answer plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "LION_ASSETS" not in os.environ:
        sys.exit("rehearse.py: set LION_ASSETS to the folder with the real vocabularies and photos/")
    if args.step == "write":
        return write(args.size, args.folder)
    if args.step:
        return answer(args.folder, packed=args.step == "answer")
    work = Path(tempfile.mkdtemp(dir=args.folder))
    official = work / "official"
    official.mkdir()
    try:
        me = ["tests/rehearse.py", "--size", args.size]
        step("write", [*me, "--step", "write", "--folder", str(official)], official)
        command = [
            "weights.py", "convert", "--vit", official / FILES["eva"], "--t5", official / "t5",
            "--bert", official / "bert", "--ram", official / FILES["ram"], "--ram-tags", official / "ram_tag_list.txt",
            "--ram-thresholds", official / "ram_tag_list_threshold.txt", "--lion", official / FILES["lion"],
        ]  # fmt: skip
        for dtype in ("bfloat16", "int8"):
            out = work / dtype
            flags = [*command, "--out", out, "--dtype", dtype]
            step(f"convert, {dtype}", [str(part) for part in flags], out)
            for how in ("answer", "answer plain"):  # packed, as for many pictures on a CPU, and as it is on disk
                _, running, disk = step(f"{how}, {dtype}", [*me, "--step", how, "--folder", str(out)], out)
                print(f"{how}, {dtype}: load and answer peak {running / disk:.3f} x the {disk:.2f} GB of the model")
            shutil.rmtree(out)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
