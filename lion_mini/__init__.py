"""LION (CVPR 2024), the multimodal LLM with dual-level visual knowledge, in plain PyTorch."""

from .config import LionConfig
from .generate import GENERATION, Generation
from .lion import Lion
from .prompts import Box

__all__ = ["GENERATION", "Box", "Generation", "Lion", "LionConfig"]
