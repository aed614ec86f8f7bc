"""What the tests share: the golden folder, the oracle, and parameters that hide nothing."""

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
KEYS = Path(__file__).parent / "keys"


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
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        around = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        parameter.data = around + std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a fraction of the largest expected value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-9)).item()
