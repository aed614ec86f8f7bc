"""The shapes world: pictures of which everything is known."""

from .world import (
    COLOURS,
    GRID,
    INSTRUCTIONS,
    KINDS,
    MOST,
    PLACES,
    RELATIONS,
    SHAPES,
    SIDES,
    TAGS,
    Record,
    Scene,
    Split,
    Thing,
    by_attributes,
    by_order,
    by_relation,
    caption,
    expression,
    matching,
    plural,
    questions,
    records,
    scene,
    show,
    tags,
    write_vocabularies,
)  # fmt: skip

__all__ = [
    "COLOURS", "GRID", "INSTRUCTIONS", "KINDS", "MOST", "PLACES", "RELATIONS", "SHAPES", "SIDES", "TAGS", "Record",
    "Scene", "Split", "Thing", "by_attributes", "by_order", "by_relation", "caption", "expression", "matching",
    "plural", "questions", "records", "scene", "show", "tags", "write_vocabularies",
]  # fmt: skip
