"""The arrows of docs/architecture.md, read from the imports of every file: lazy ones and those for types included."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

FOLDERS: dict[str, set[str]] = {
    "data_prep": set(),
    "model": set(),
    "pipeline": {"data_prep", "model"},
    "launch": {"data_prep", "model", "pipeline"},
}
"""Folder → folders that it may import."""

DATASET = {"data_prep.errors", "data_prep.hashing", "data_prep.manifest", "data_prep.remote", "data_prep.store"}
"""What pipeline/ may import of data_prep/: how to read a dataset, not how to make one."""

ROOMS: dict[str, dict[str, set[str]]] = {
    "pipeline": {
        "exit_codes": set(),
        "files": set(),
        "random_state": set(),
        "redact": set(),
        "settings": set(),
        "config": {"redact", "settings"},
        "distributed": {"exit_codes"},
        "data": {"files", "settings"},
        "context": {"config", "data", "distributed", "settings"},
        "tracking": {"files", "redact", "settings"},
        "metrics": {"context", "distributed", "tracking"},
        "generation": set(),
        "engine": {"config", "data", "distributed", "files", "random_state", "settings"},
        "evaluation": {"context", "data", "distributed", "engine", "generation", "tracking"},
        "health": {
            *("context", "data", "distributed", "engine", "files", "metrics", "redact", "settings"),
            "tracking",
        },
        "meters": {"context", "distributed", "health", "metrics", "tracking"},
        "checkpoints": {
            *("config", "context", "data", "distributed", "engine", "evaluation", "files", "health", "random_state"),
            *("redact", "settings"),
        },
        "export": {"checkpoints", "config", "data", "evaluation", "generation", "metrics", "redact"},
        "fitting": {
            *("checkpoints", "config", "context", "data", "distributed", "engine", "export", "settings"),
        },
        "introduce": {"checkpoints", "context"},
        "record": {"checkpoints", "config", "context", "data", "evaluation", "metrics", "redact", "tracking"},
        "trainer": {
            *("checkpoints", "context", "data", "distributed", "engine", "evaluation", "health", "meters", "metrics"),
            *("random_state", "record", "settings", "tracking"),
        },
        "build": {
            *("checkpoints", "config", "context", "distributed", "engine", "evaluation", "export", "fitting"),
            *("health", "introduce", "meters", "metrics", "record", "tracking", "trainer"),
        },
        "train": {"build", "checkpoints", "config", "distributed", "engine", "exit_codes"},
    },
    "launch": {
        "about": set(),
        "hosts": set(),
        "interrupt": set(),
        "quickstart": set(),
        "report": {"about"},
        "serve": set(),
        "evaluation": set(),
        "jobs": {"hosts", "report"},
        "preflight": {"about", "hosts", "jobs"},
        "settings": set(),
        "commands": {"evaluation", "jobs", "preflight", "report", "serve", "settings"},
        "cli": {"about", "commands", "interrupt"},
        "__main__": {"cli"},
    },
}
"""Room → rooms of the same folder that it may import; each may use only what stands above it."""

PRIVATE = "pipeline/engine/internals.py"

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(module: str) -> Iterator[tuple[str, int]]:
    """What a file imports, as full names, and the line."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((item.name, node.lineno) for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{item.name}" for item in node.names]
            yield from ((name if name in FILES else base, node.lineno) for name in names)


ARROWS = sorted({(module, target, line) for module in FILES for target, line in imports(module)})


def places(wrong: list[tuple[str, str, int]]) -> list[str]:
    return [f"{FILES[module].relative_to(ROOT)}:{line} imports {target}" for module, target, line in wrong]


def test_folders_point_upstream() -> None:
    wrong = []
    for module, target, line in ARROWS:
        here, there = module.split(".")[0], target.split(".")[0]
        if there in FOLDERS and there != here and there not in FOLDERS[here]:
            wrong.append((module, target, line))
        if here == "pipeline" and there == "data_prep" and target not in DATASET:
            wrong.append((module, target, line))
    assert places(wrong) == []


@pytest.mark.parametrize("folder", ROOMS)
def test_rooms_point_as_drawn(folder: str) -> None:
    drawn = ROOMS[folder]
    assert {module.split(".")[1] for module in FILES if module.startswith(f"{folder}.")} == set(drawn)
    above: set[str] = set()
    for room, uses in drawn.items():
        assert uses <= above, f"{room} uses {sorted(uses - above)}, which stand below it"
        above.add(room)
    found: dict[str, set[str]] = {room: set() for room in drawn}
    wrong = []
    for module, target, line in ARROWS:
        if module.startswith(f"{folder}.") and target.startswith(f"{folder}."):
            here, there = module.split(".")[1], target.split(".")[1]
            if here != there:
                found[here].add(there)
                wrong += [(module, target, line)] if there not in drawn[here] else []
    assert places(wrong) == []
    assert found == drawn, "an arrow of the drawing is no longer used"


def for_types_alone(module: str) -> set[int]:
    """The lines behind `if TYPE_CHECKING`, which never run."""
    blocks = [node for node in ast.walk(ast.parse(FILES[module].read_text())) if isinstance(node, ast.If)]
    named = [node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING"]
    return {line for node in named for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def test_no_circle_between_files() -> None:
    """Imports inside functions count; those for types alone do not."""
    skipped = {module: for_types_alone(module) for module in FILES}
    uses: dict[str, set[str]] = {module: set() for module in FILES}
    for module, target, line in ARROWS:
        if target in FILES and line not in skipped[module]:
            uses[module].add(target)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module not in done:
            for target in uses[module] - {module}:
                visit(target, (*way, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_model_travels_alone() -> None:
    """Its files are copied beside the weights: relative imports of each other, and nothing else of ours."""
    for path in (ROOT / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path}:{node.lineno}"
                names = [] if node.level else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & FOLDERS.keys(), f"{path}: {names}"


def test_preparing_data_never_imports_torch() -> None:
    """Not through a third either: every module of data_prep/ is imported in a process of its own."""
    modules = [module for module in FILES if module.split(".")[0] == "data_prep" and not module.endswith("ray_engine")]
    program = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_faces_say_one_sentence() -> None:
    """A folder's `__init__` imports nothing, so that asking for one room does not open the others."""
    for module, path in FILES.items():
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            assert [ast.get_docstring(tree) is not None, len(tree.body)] == [True, 1], module


def test_only_one_file_touches_what_deepspeed_keeps_private() -> None:
    found = []
    for path in FILES.values():
        if path.relative_to(ROOT).as_posix() == PRIVATE or path.parts[len(ROOT.parts)] not in ("pipeline", "launch"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and is_private(node):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.Assign) and any(is_optimizer(item) for item in ast.walk(node.value)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
                names = [item.name for item in node.names if item.name.startswith("_")]
                found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names]
    assert found == []


def is_engine(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "engine") or (
        isinstance(node, ast.Attribute) and node.attr == "engine"
    )


def is_optimizer(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "optimizer" and is_engine(node.value)


def is_private(node: ast.Attribute) -> bool:
    """`engine._name`, or any name behind `engine.optimizer`."""
    return (is_engine(node.value) and node.attr.startswith("_")) or is_optimizer(node.value)


def test_deepspeed_still_has_what_is_used_of_its_inside() -> None:
    """After an update of DeepSpeed this says which names have gone."""
    from pipeline.engine.internals import PRIVATE_NAMES

    gone = []
    for name, attributes in PRIVATE_NAMES.items():
        module, _, kind = name.rpartition(".")
        found = getattr(importlib.import_module(module), kind, None)
        text = "".join(inspect.getsource(base) for base in found.__mro__[:-1]) if found else ""
        gone += [f"{name}.{item}" for item in attributes if f".{item}" not in text and not hasattr(found, item)]
    assert gone == []


LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 8


def test_files_functions_and_parameter_lists_fit_on_a_screen() -> None:
    """Of the product; of the tests, the files. Exceptions: the options of a command, the arguments of a kernel, the
    signatures that transformers asks for.
    """
    found = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in [*FILES.values(), *sorted((ROOT / "tests").rglob("*.py"))]
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    ]
    for path in FILES.values():
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                arguments = node.args
                count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
                found += [f"{name}: {node.name}: {lines} lines"] if lines > LONGEST_FUNCTION else []
                free = name.startswith("launch/commands/") or is_given(node)
                found += [f"{name}: {node.name}: {count} parameters"] if count > MOST_PARAMETERS and not free else []
    assert found == []


def is_given(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A Triton kernel, or a method whose signature transformers fixes."""
    kernel = any(ast.unparse(item).startswith("triton.jit") for item in node.decorator_list)
    return kernel or node.name == "forward" or node.name.startswith("prepare_")


def test_no_test_imports_another() -> None:
    """What several tests use lies in a file of its own, so that each can be run, moved and deleted alone."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2].startswith("test_"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {node.module}")
    assert wrong == []
