"""What the tests share: the golden folder, the oracle, and parameters that hide nothing.

LION_DEVICE=cuda opens the golden model on a GPU; LION_DTYPE=float64 computes in it. Rounding is large in this model:
on a CPU without oneDNN, T5's float32 states are already 1.4e-4 away from the golden ones.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts stand beside the package

import weights  # noqa: E402
from lion_mini import Lion  # noqa: E402

torch.set_num_threads(1)  # the models here are tiny: a second thread waits more than it works
torch.backends.cudnn.allow_tf32 = False  # convolutions; matrix products are exact by default

GOLDEN = ROOT / "tests" / "golden"
KEYS = ROOT / "tests" / "keys"
OFFICIAL = GOLDEN / "official"
DEVICE = os.environ.get("LION_DEVICE", "cpu")
DTYPE: torch.dtype = getattr(torch, os.environ.get("LION_DTYPE", "float32"))


def convert(out: Path, **changes: object) -> int:
    """weights.py convert on the golden files; `vit=path` uses another file, `lion=None` leaves one out."""
    flags: dict[str, object] = {
        "vit": OFFICIAL / "eva_vit_g.pth",
        "t5": OFFICIAL / "flan-t5",
        "bert": OFFICIAL / "bert-base-uncased",
        "ram": OFFICIAL / "ram_swin_large_14m.pth",
        "ram-tags": OFFICIAL / "ram_tag_list.txt",
        "ram-thresholds": OFFICIAL / "ram_tag_list_threshold.txt",
        "lion": OFFICIAL / "LION-FlanT5-XL.pth",
        "config": GOLDEN / "sizes.json",
        "out": out,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return weights.main(["convert", *(part for k, v in flags.items() if v is not None for part in (f"--{k}", str(v)))])


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "golden"
    assert convert(folder) == 0
    return folder


@pytest.fixture
def golden_model(golden_folder: Path) -> Lion:
    lion = Lion.from_pretrained(golden_folder, DEVICE)
    lion.model.to(DTYPE)
    return lion


@pytest.fixture(scope="session")
def numbers() -> dict[str, Tensor]:
    found = load_file(GOLDEN / "golden.safetensors", DEVICE)
    return {name: x.to(DTYPE) if x.is_floating_point() else x for name, x in found.items()}


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    return json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))


def oracle(name: str = "transformers") -> ModuleType:
    """The reference implementation, a test-time dependency only: skip without it, fail where CI demands it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("LION_REQUIRE_ORACLE"):
            pytest.fail(f"{name} is missing, and LION_REQUIRE_ORACLE is set")
        pytest.skip(f"{name} is the oracle of this test: pip install -e '.[dev]'")


def assets() -> Path:
    """The real vocabularies and photos, which are not ours to ship."""
    folder = os.environ.get("LION_ASSETS")
    if not folder:
        pytest.skip("set LION_ASSETS to a folder with t5_tokenizer.json, bert_vocab.txt, ram_tag_list.txt and photos/")
    return Path(folder)


def randomise(module: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Every parameter random, norms and zero-initialised ones too: default values hide swapped tensors."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        around = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype, device=generator.device)
        parameter.data = around + std * noise


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a fraction of the largest expected value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-9)).item()
