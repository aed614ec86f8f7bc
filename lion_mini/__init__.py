"""LION (CVPR 2024), a multimodal LLM with dual-level visual knowledge, in plain PyTorch."""

import signal
import sys

if sys.argv[:1] == ["-m"] and any("lion_mini." in word for word in sys.orig_argv):  # python -m lion_mini.data
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the scripts do

from .box import Box
from .config import LionConfig
from .model.generate import GENERATION, Generation
from .pipeline import Lion

__all__ = ["GENERATION", "Box", "Generation", "Lion", "LionConfig"]
