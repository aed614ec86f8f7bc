"""The layout: who may import whom."""

import ast
import re
import sys
from collections.abc import Iterator

from conftest import ROOT

PACKAGE = ROOT / "lion_mini"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name: str) -> Iterator[str]:
    """Every module that this one imports, by its full name."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module


def test_model_imports_the_method_alone() -> None:
    """torch, einops, the standard library, ..config and its own files."""
    for name in (name for name in MODULES if name.startswith("lion_mini.model")):
        for found in imports(name):
            top = found.split(".")[0]
            ours = found == "lion_mini.config" or found.startswith("lion_mini.model.")
            assert ours or top in ("torch", "einops", *sys.stdlib_module_names), f"{name} imports {found}"


def test_components_do_not_know_the_whole() -> None:
    parts = {"t5": {"adapters"}, "ram": {"swin"}, "generate": {"t5"}}
    for name in ("vit", "bert", "qformer", "aggregator", "adapters", "t5", "generate", "swin", "ram"):
        ours = {found.split(".")[-1] for found in imports(f"lion_mini.model.{name}") if found.startswith("lion_mini")}
        assert ours <= {"config", "layers", "bert"} | parts.get(name, set()), name


def test_only_the_toy_knows_the_toy() -> None:
    for name in MODULES:
        if name.split(".")[1:2] != ["toy"]:
            assert not any(found.startswith("lion_mini.toy") for found in imports(name)), name


def test_no_import_cycle() -> None:
    waiting = {name: {found for found in imports(name) if found in MODULES} - {name} for name in MODULES}
    while ready := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting, f"a cycle among {sorted(waiting)}"


def test_the_wheel_holds_every_module() -> None:
    """setuptools finds packages by their __init__.py."""
    for folder in {path.parent for path in MODULES.values()}:
        assert (folder / "__init__.py").is_file(), folder


def test_every_file_fits_in_the_head() -> None:
    """Files of at most 330 lines; functions of at most 60, argument parsers excepted."""
    for path in (*MODULES.values(), *ROOT.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 330, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "parse":
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


PAPER = {  # what there is in the paper
    "section": "1 2 2.1 2.2 3 3.1 3.1.1 3.1.2 3.1.3 3.2 4 4.1 4.2 4.3 4.4 4.5 5",
    "Appendix": "A B B.1 B.2", "Table": "1 2 3 4 5 6 7 8 9", "Figure": "1 2 3 4 5 6 7", "eq": "1 2 3 4 5",
}  # fmt: skip
POINTERS = """
    model/vit.py          section 3.1
    model/qformer.py      section 3.1.2
    model/aggregator.py   section 3.1.3, equations (4) and (5)
    model/adapters.py     section 3.1.2, equations (1) to (3)
    model/t5.py           section 3.1.2
    model/lion.py         section 3, Figure 3
    model/swin.py         section 3.2
    model/ram.py          section 3.2
    model/generate.py     section 4.1
    text/prompts.py       section 3.2, Figure 5, Table 9
    box.py                section 3.1.1
    training/stages.py    section 3.1.2, Appendix A
    data/convert.py       Table 7
    evaluation/readers.py Table 8
"""  # what each file names at least


def pointers(text: str) -> set[str]:
    """The sections, tables, ... of the paper that a text names: "eq. 4, 5" is {"eq 4", "eq 5"}."""
    number = r"\(?[0-9](?:\.[0-9])*\)?"
    found = re.finditer(rf"\b(section|Table|Figure|eq)(?:uation)?s?\.? ({number}(?:(?:,| and| to) {number})*)", text)
    numbered = {f"{match[1]} {name}" for match in found for name in re.findall(r"[0-9](?:\.[0-9])*", match[2])}
    return numbered | set(re.findall(r"\bAppendix \w(?:\.[0-9])?", text))


def test_pointers_to_the_paper() -> None:
    assert pointers("Tables 1, 2 and 5, eq. (3)") == {"Table 1", "Table 2", "Table 5", "eq 3"}
    known = {f"{kind} {number}" for kind, numbers in PAPER.items() for number in numbers.split()}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.md")]:
        assert pointers(path.read_text(encoding="utf-8")) <= known, path
    for name, least in re.findall(r"(\S+\.py) +(.*)", POINTERS):
        assert pointers((PACKAGE / name).read_text(encoding="utf-8")) >= pointers(least) > set(), name
