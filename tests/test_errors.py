"""A walk through the error tree: exported, documented, drawn where it hangs, and readable on one line."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest

import blockpress
from blockpress import errors
from blockpress.errors import BlockpressError

PACKAGE = Path(blockpress.__file__).parent


def tree(root: type[BlockpressError] = BlockpressError) -> list[type[BlockpressError]]:
    """All but those of a room's own, which are caught or answered there and begin with an underscore."""
    public = (child for child in root.__subclasses__() if not child.__name__.startswith("_"))
    return [root, *(kind for child in public for kind in tree(child))]


TREE = tree()


def test_every_class_of_the_module_is_in_the_tree_and_exported():
    classes = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert classes == set(errors.__all__) == {kind.__name__ for kind in TREE}
    assert errors.__all__ == sorted(errors.__all__)


def test_the_root_is_a_public_name():
    assert blockpress.BlockpressError is BlockpressError


def test_no_other_room_makes_public_errors():
    """Another exception class would escape whoever catches BlockpressError."""
    made = {}
    for file in PACKAGE.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        if not re.search(r"\bclass \w+\(", source):
            continue  # to read it would take longer than the others together
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                if any(base.endswith(("Error", "Exception")) or base in errors.__all__ for base in bases):
                    made[node.name] = file.relative_to(PACKAGE).as_posix()
    assert {name for name, file in made.items() if file != "errors.py"} == set()
    assert set(made) == set(errors.__all__)


@pytest.mark.parametrize("kind", TREE)
def test_every_error_has_its_own_sentence(kind: type[BlockpressError]):
    own = vars(kind).get("__doc__")
    assert own
    assert own.strip().split("\n")[0].endswith(".")


@pytest.mark.parametrize("kind", TREE[1:])
def test_every_error_is_drawn_under_its_parent(kind: type[BlockpressError]):
    assert errors.__doc__ is not None
    drawn = re.findall(r"^( *[│├└─ ]*)(\w+)(?:  .*)?$", errors.__doc__.split("\n\n")[1], flags=re.MULTILINE)
    path: dict[int, str] = {}
    parents = {}
    for indent, name in drawn:
        depth = len(indent)
        parents[name] = next((path[d] for d in sorted(path, reverse=True) if d < depth), None)
        path = {d: other for d, other in path.items() if d < depth} | {depth: name}
    assert parents[kind.__name__] == kind.__base__.__name__
    assert set(parents) == set(errors.__all__)


@pytest.mark.parametrize("kind", TREE)
def test_str_is_one_line_with_message_and_hint(kind: type[BlockpressError]):
    error = kind("the field x\nis  3", hint="x must be\n4")
    assert str(error) == "the field x is 3 (hint: x must be 4)"
    assert (error.message, error.hint) == ("the field x is 3", "x must be 4")
    with pytest.raises(BlockpressError, match="the field x is 3"):
        raise error


@pytest.mark.parametrize("kind", TREE)
def test_every_error_needs_a_hint(kind: type[BlockpressError]):
    with pytest.raises(TypeError, match="hint"):
        kind("the field x is 3")  # type: ignore[call-arg]


@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_errors_can_be_pickled(again):  # type: ignore[no-untyped-def]
    error = again(errors.PuzzleError("the field x is 3", hint="x must be 4"))
    assert str(error) == "the field x is 3 (hint: x must be 4)"
