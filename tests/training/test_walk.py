"""The commands of training/README.md, from the downloads to an exported LION, with tiny pictures and a tiny model."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import torch
from conftest import GOLDEN, OFFICIAL, ROOT
from PIL import Image

PAGE = (ROOT / "lion_mini" / "training" / "README.md").read_text(encoding="utf-8")
# As the page's commands, with tiny sizes and short runs.
SHORT = f"""
python() {{
    case "$1 $2" in
        "weights.py convert") command "{sys.executable}" {ROOT}/"$@" --config {GOLDEN}/sizes.json ;;
        train.py*) command "{sys.executable}" {ROOT}/"$@" --steps 2 --batch 2 --draw-every 2 --seed 3 ;;
        -m*) command "{sys.executable}" "$@" ;;
        *) command "{sys.executable}" {ROOT}/"$@" ;;
    esac
}}
set -e
"""


def downloads(folder: Path) -> None:
    """The official files below `folder`, each with a few entries, and their pictures."""
    for file in OFFICIAL.iterdir():
        (folder / {"flan-t5": "flan-t5-xl"}.get(file.name, file.name)).symlink_to(file)
    train, val = "COCO_train2014_000000000002.jpg", "COCO_val2014_000000000005.jpg"
    for i, name in enumerate((
        "coco_2017/train2017/000000000001.jpg", f"vqav2/images/train2014/{train}", f"coco/images/val2014/{val}",
        "OCR-VQA/images/3.jpg", "textcaps/images/train_images/ab.jpg", "visual_genome/VG_100K_2/4.jpg",
    )):  # fmt: skip
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (40 * i, 90, 200 - 30 * i)).save(path)
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    questions = {"questions": [{"question_id": 1, "image_id": 2, "question": "Which?"}], "data_subtype": "train2014"}
    annotations = {"annotations": [{"question_id": 1, "image_id": 2, "answers": [{"answer": "red"}] * 10}]}
    aokvqa = {"split": "train", "image_id": 1, "question_id": "q", "question": "Who?", "direct_answers": ["me"]}
    book = {"imageURL": "http://x/3.gif", "questions": ["Who wrote it?"], "answers": ["Ann"], "split": 1}
    region = {"region_id": 9, "image_id": 4, "phrase": "the cat", "x": 8, "y": 8, "width": 30, "height": 20}
    size = {"width": 64, "height": 48}
    refs = [
        {"ref_id": i, "ann_id": 7, "image_id": 2, "split": split, "sentences": [{"sent_id": i, "sent": "the cat"}]}
        for i, split in enumerate(("train", "testA"))
    ]
    objects = [{"id": 7, "image_id": 2, "bbox": [8, 8, 30, 20]}]
    files = {
        "llava_instruct_150k.json": [{"id": "a", "image": "000000000001.jpg", "conversations": talk}],
        "v2_OpenEnded_mscoco_train2014_questions.json": questions,
        "v2_mscoco_train2014_annotations.json": annotations,
        "OpenEnded_mscoco_train2014_questions.json": questions,
        "mscoco_train2014_annotations.json": annotations,
        "aokvqa_v1p0_train.json": [aokvqa],
        "dataset.json": {"3": book, "gone": book},
        "captions_train2014.json": {
            "images": [{"id": 2, "file_name": train}],
            "annotations": [{"image_id": 2, "id": 1, "caption": "A cat."}],
        },
        "TextCaps_0.1_train.json": {"data": [{"image_id": "ab", "caption_str": "A sign."}]},
        "region_descriptions.json": [{"id": 4, "regions": [region]}],
        "image_data.json": [{"image_id": 4, "url": "https://x/VG_100K_2/4.jpg", **size}],
        "coco_karpathy_test.json": [{"image": f"val2014/{val}", "caption": ["A cat.", "One cat."]}],
        "instances.json": {"images": [{"id": 2, "file_name": train, **size}], "annotations": objects},
    }
    (folder / "data" / "ann").mkdir()
    for name, content in files.items():
        (folder / "data" / "ann" / name).write_text(json.dumps(content))
    (folder / "data" / "ann" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def run(script: str, folder: Path) -> str:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", SHORT + script]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_command(tmp_path: Path) -> None:
    downloads(tmp_path)
    printed = run("\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)), tmp_path)
    assert "1 records without a picture left out" in printed  # OCR-VQA's second book
    assert "| refcoco_testA | Acc@0.5 |" in printed
    exported = torch.load(tmp_path / "LION-refcoco.pth", weights_only=True)["model"]
    assert "query_tokens" in exported
    tags = [json.loads(line)["tags"] for file in (tmp_path / "tagged").iterdir() for line in file.open()]
    assert len(tags) == 12
    for stage in ("one", "two", "lion", "refcoco"):
        lines = (tmp_path / "runs" / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["bad"] for line in lines] == [0, 0]


def test_fine_tuning_asks_what_it_trained(tmp_path: Path, golden_folder: Path) -> None:
    """The README's block, on a picture of its own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "mine.jsonl" in block]
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "xl").symlink_to(golden_folder)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photos" / "a.jpg")
    run(block.replace("--steps 500", ""), tmp_path)
    trained = [json.loads(line)["question"] for line in (tmp_path / "mine.jsonl").open()]
    [answered] = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    assert any(answered["prompt"].endswith(question) for question in trained)
