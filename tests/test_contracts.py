"""What holds for the whole package, whatever its rooms do: its sizes, its doors, its docstrings, its imports."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import grimp
import pytest

import blockpress
from blockpress import decoding, engine, errors, sudoku
from blockpress.config import Sampling
from blockpress.errors import RequestError
from blockpress.lm import LM
from blockpress.train.objective import Objective

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "blockpress").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
MOST_LINES = 350
MOST_FUNCTION_LINES = 50
MOST_KERNEL_LINES = 80
# Doors: they take wrong values on purpose, to refuse them by name. `shapes` holds the aliases themselves.
UNCHECKED = {
    "blockpress.bench.gpu.standin",
    "blockpress.constrain.automaton",  # every check of an expression would walk all of its parts
    "blockpress.constrain.compiler",
    "blockpress.constrain.nondeterministic",
    "blockpress.constrain.threads",
    "blockpress.lm.logits",
    "blockpress.lm.model",
    "blockpress.shapes",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code and signature: an example in a docstring makes no function long."""
    assert node.end_lineno is not None
    first, whole = node.body[0], node.end_lineno - node.lineno + 1
    said = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno is not None
    return whole - (first.end_lineno - first.lineno + 1 if said and first.end_lineno else 0)


def test_modules_open_with_a_docstring() -> None:
    assert [str(path.relative_to(ROOT)) for path in SOURCES if not ast.get_docstring(tree(path))] == []


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_functions_are_short() -> None:
    lines = {f"{module_name(path)}.{node.name}": length(node) for path in SOURCES for node in functions(path)}
    # A kernel is one program: its state is in registers, and a call that hands it on would hide that.
    most = {name: MOST_KERNEL_LINES if ".ops.kernels." in name else MOST_FUNCTION_LINES for name in lines}
    assert {function: count for function, count in lines.items() if count > most[function]} == {}


def test_no_operation_imports_itself_by_way_of_others() -> None:
    """Imports for types and those inside of functions count too."""
    graph = grimp.build_graph("blockpress", cache_dir=None)
    operations = graph.find_descendants("blockpress.ops")
    imported = {each: graph.find_modules_directly_imported_by(each) for each in operations}
    assert operations <= set(TopologicalSorter(imported).static_order()), "or a CycleError that names the circle"


def test_one_public_name_has_one_meaning() -> None:
    """Names that other modules import. Apart stand: the versions of one operation in `ops`, what every part of
    `bench/gpu` is asked for, the entry points, and a command, which is called as its user types it."""
    homes: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(module_name(path))
    alike = {"main": "blockpress", "bench": "blockpress.bench.gpu", "checks": "blockpress.bench.gpu"}
    twice = {}
    for name, modules in homes.items():
        others = {each for each in modules if each != f"blockpress.cli.{name}"}
        room = alike.get(name, "blockpress.ops")
        if len(others) > 1 and not all(each.startswith(f"{room}.") for each in others):
            twice[name] = sorted(modules)
    assert twice == {}


def test_no_room_is_named_utils_or_common() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert [module_name(path) for path in SOURCES if drawers & set(module_name(path).split("."))] == []


def test_only_hardware_asks_about_the_machine() -> None:
    asking = re.compile(
        r"cpuinfo|get_cpu_capability|platform\.processor|cpu_count|"
        r"proc/|sysconf|getrusage|mem_get_info|get_device_(name|properties|capability)"
    )
    found = {module_name(path) for path in SOURCES if asking.search(path.read_text(encoding="utf-8"))}
    assert found == {f"blockpress.hardware.{name}" for name in ("memory", "process", "system")}


def test_the_public_names_are_sorted_and_importable() -> None:
    def order(name: str) -> tuple[int, str]:  # constants, classes, functions: as ruff sorts every other `__all__`
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert blockpress.__all__ == sorted(set(blockpress.__all__), key=order)
    assert set(dir(blockpress)) == set(blockpress.__all__)
    for name in blockpress.__all__:
        assert getattr(blockpress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        blockpress.lode  # noqa: B018


@pytest.mark.parametrize("name", [module_name(path) for path in SOURCES if path.name != "__main__.py"])
def test_exports_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert [export for export in getattr(module, "__all__", []) if not hasattr(module, export)] == []


@pytest.mark.parametrize(
    "statement",
    [
        "import blockpress",
        "import blockpress.config, blockpress.errors, blockpress.sudoku, blockpress.text",
        "from blockpress.cli.main import main\nassert main(['--help']) == 0",
    ],
    ids=["door", "light rooms", "help"],
)
def test_torch_is_not_imported_early(statement: str) -> None:
    code = (
        f"import sys\n{statement}\nprint('heavy:', *sorted({{'torch', 'transformers', 'triton'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]


def test_shapes_are_checked_wherever_they_are_written() -> None:
    """A room that annotates tensors must be among those of `make shapes`, or its annotations are only words."""
    lines = re.findall(r"^SHAPED \+?:?= (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    checked = [f"blockpress.{room}" for line in lines for room in line.split()]
    assert len(checked) > 10
    shaped = {
        module_name(path) for path in SOURCES if re.search(r"jaxtyping|blockpress\.shapes", path.read_text("utf-8"))
    }
    unchecked = {name for name in shaped if not any(name == room or name.startswith(f"{room}.") for room in checked)}
    assert unchecked <= UNCHECKED


def test_the_drawn_error_tree_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn, above = {}, ["Exception"]
    for line in errors.__doc__.splitlines():
        if match := re.match(r"^    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)", line):
            depth = len(match["branch"]) // 4
            above[depth + 1 :] = [match["name"]]
            drawn[match["name"]] = above[depth]
    assert drawn == {name: getattr(errors, name).__base__.__name__ for name in errors.__all__}


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (blockpress, "Broken", "MalformedToolCallEvent"),
        (blockpress, "BrokenCall", "MalformedToolCall"),
        (blockpress, "Called", "ToolCallEvent"),
        (blockpress, "Thought", "ReasoningDelta"),
        (engine, "Core", "EngineCore"),
        (engine, "Engine", "ThreadedEngine"),
        (sudoku, "generate", "generate_puzzle"),
        (sudoku, "parse", "parse_puzzle"),
        (sudoku, "pool", "puzzle_pool"),
    ],
)
def test_an_older_name_still_works_and_says_the_newer_one(module: ModuleType, old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now .*{new}"):
        found = getattr(module, old)
    assert found is getattr(module, new) and old not in dir(module)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        (Sampling, "checks", "max_verifications"),
        (decoding.Usage, "checks", "verifications"),
        (decoding.Usage, "rounds", "redos"),
        (decoding.Denoised, "attempt", "retry"),
        (decoding.Denoised, "checks", "verifications"),
        (Objective, "ages", "max_trajectory_steps"),
        (Objective, "past", "steps_past_settling"),
        (Objective, "groups", "row_groups"),
        (LM, "requests", "build_requests"),
        (LM, "chat_requests", "build_chat_requests"),
    ],
)
def test_an_older_attribute_still_works_and_says_the_newer_one(kind: type, old: str, new: str) -> None:
    one = Mock(spec_set=[new])
    with pytest.warns(DeprecationWarning, match=f"{old} is now .*{new}"):
        assert getattr(kind, old).fget(one) is getattr(one, new)
    assert hasattr(kind, new)


USAGE = {
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "canvases": 1,
    "steps": 1,
    "forwards": 1,
    "tokens_per_forward": 1.0,
}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        (Sampling, "checks", "max_verifications"),
        (partial(decoding.Usage, **USAGE), "checks", "verifications"),
        (partial(decoding.Usage, **USAGE), "rounds", "redos"),
        (Objective, "ages", "max_trajectory_steps"),
        (Objective, "past", "steps_past_settling"),
        (Objective, "groups", "row_groups"),
    ],
)
def test_a_value_is_made_and_changed_by_an_older_field_s_name_too(kind: Callable[..., Any], old: str, new: str) -> None:
    older, newer = {old: 3}, kind(**{new: 3})
    with pytest.warns(DeprecationWarning, match=f"{old} is now .*{new}"):
        assert kind(**older) == newer
    with pytest.warns(DeprecationWarning, match=new):
        assert replace(kind(), **older) == newer
    with pytest.raises(TypeError, match="unexpected keyword argument 'chekcs'"):
        kind(chekcs=3)


def test_a_sampling_with_an_older_field_s_name_says_the_newer_one() -> None:
    with pytest.warns(DeprecationWarning, match="Sampling.checks is now Sampling.max_verifications") as warned:
        assert Sampling().with_(checks=3, steps=5) == Sampling(max_verifications=3, steps=5)
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="max_verifications") as warned:
        assert Sampling(checks=3).max_verifications == 3
    assert warned[0].filename == __file__, "the line that has the older name"
    with pytest.raises(RequestError, match="no field 'chekcs'"):
        Sampling().with_(chekcs=1)


@cache
def asserts(node: ast.AST) -> bool:
    """Whether a piece of code asserts something itself."""
    return any(isinstance(each, ast.Assert) for each in ast.walk(node))


@cache
def called(node: ast.AST) -> frozenset[str]:
    """What a piece of code calls, by the last part of its name: `assert_close` of `torch.testing.assert_close`."""
    functions = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
    names = {each.id for each in functions if isinstance(each, ast.Name)}
    return frozenset(names | {each.attr for each in functions if isinstance(each, ast.Attribute)})


def written_tests(module: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The tests of a module and of its classes: those within functions are nobody's."""
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            yield from written_tests(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node


def can_fail(node: ast.AST, comparing: set[str]) -> bool:
    """Whether a piece of code asserts something, by itself or by a function that does; a method's name has to say so."""
    if asserts(node):
        return True
    named = {name for name in called(node) if re.match(r"(check|assert)(_|$)", name)}
    return bool(named | called(node) & (comparing | {"raises", "warns"}))


def comparing(module: ast.Module, path: Path) -> set[str]:
    """The functions that a module of tests defines, or takes from another one, and that assert something."""
    found = {name for node in module.body if isinstance(node, ast.ImportFrom) for name in comparing_names(node, path)}
    waiting = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    while more := {name for name, node in waiting.items() if name not in found and can_fail(node, found)}:
        found |= more
    return found


def comparing_names(node: ast.ImportFrom, path: Path) -> set[str]:
    folder = path.parents[node.level - 1] if node.level else ROOT
    source = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")
    if not (source.is_relative_to(ROOT / "tests") and source.is_file()):
        return set()
    return {each.asname or each.name for each in node.names if each.name in comparing_in(source)}


@cache
def comparing_in(source: Path) -> set[str]:
    return comparing(tree(source), source)


@pytest.mark.parametrize(
    ("code", "compares"),
    [
        ("def test(): assert 1 == one()", True),
        ("def test():\n  with pytest.raises(ValueError): one()", True),
        ("def test(): torch.testing.assert_close(one(), 1)", True),
        ("def test(): scheduler.check()", True),
        ("def test(): scheduler.checked()", False),
        ("def test(): load(folder)", False),
        ("def close(a): assert a\ndef both(a): close(a)\ndef test(): both(1)", True),
        ("def test(): close(1)", False),
        ("from tests.builders.files import refusal\ndef test(): refusal(folder)", True),
        ("from tests.builders.files import same\ndef test(): same({}, {})", False),
        ("from .builders.files import refusal as error\ndef test(): error(folder)", True),
    ],
)
def test_a_test_that_cannot_fail_is_seen(code: str, compares: bool) -> None:
    assert ("test" in comparing(ast.parse(code), ROOT / "tests" / "test_it.py")) is compares


@pytest.mark.slow
def test_every_test_can_fail() -> None:
    """One that only calls what it is named for proves that nothing was raised, and would pass without a result."""
    assert [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in TESTS
        for node in written_tests(tree(path))
        if not can_fail(node, comparing_in(path))
    ] == []


def test_comparisons_with_other_libraries_are_marked() -> None:
    """`make test-fast` leaves them out by their mark."""
    oracle = re.compile(r"(import|from) (transformers|compressed_tensors)\b|importorskip\(\"transformers")
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in TESTS}
    assert [name for name, text in texts.items() if oracle.search(text) and "pytest.mark.parity" not in text] == []
