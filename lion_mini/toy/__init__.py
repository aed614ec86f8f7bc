"""The toy world: images of which everything is known, to train and test LION without any download."""

from .questions import KINDS, Record, caption, expression, questions, records, tags, true_tags
from .vocab import write_vocabularies
from .world import COLOURS, SHAPES, TAGS, Scene, Split, Thing, scene

__all__ = [
    "COLOURS", "KINDS", "SHAPES", "TAGS", "Record", "Scene", "Split", "Thing",
    "caption", "expression", "questions", "records", "scene", "tags", "true_tags", "write_vocabularies",
]  # fmt: skip
