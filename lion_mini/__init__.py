"""LION (CVPR 2024), a multimodal LLM with dual-level visual knowledge, in plain PyTorch."""

from .box import Box
from .config import LionConfig
from .model.generate import GENERATION, Generation
from .pipeline import Lion

__all__ = ["GENERATION", "Box", "Generation", "Lion", "LionConfig"]
