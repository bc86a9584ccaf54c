"""Imports point one way, and `import proxstep` needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "proxstep"

ROOMS = (
    ("errors", "typing"),
    ("logprobs",),
    ("algorithms", "isopo"),
    ("budget",),
    ("hub", "rewards"),
    ("tasks",),
    ("config",),
    ("runs",),
    ("training",),
    ("engines",),
    ("lab",),
    ("cli", "__main__"),
)
"""A room imports from its own floor and those before it."""

LATE = {"isopo.experts": {"transformers"}}
"""What the forward of another library's layer imports when it runs."""

TORCH_ONLY = ("errors", "typing", "logprobs", "algorithms", "isopo", "budget")


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCE.rglob("*.py")
        if path != SOURCE / "__init__.py"
    }


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def floor_of(module: str) -> int:
    top = module.split(".")[0]
    found = [i for i, names in enumerate(ROOMS) if top in names]
    assert len(found) == 1, f"{module} is not in exactly one room"
    return found[0]


def test_imports_point_one_way() -> None:
    known = modules()
    assert len(known) > 30
    wrong = []
    for name, path in known.items():
        for imported in imports_of(path):
            if not imported.startswith("proxstep."):
                continue
            target = imported.removeprefix("proxstep.")
            if target == "__version__":
                continue
            if floor_of(target) > floor_of(name):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_cycles() -> None:
    known = modules()
    edges = {
        name: {i.removeprefix("proxstep.") for i in imports_of(path)} & set(known) - {name}
        for name, path in known.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for target in edges.get(name, ()):
                visit(target, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_the_core_imports_only_torch() -> None:
    allowed = {"torch", "proxstep", "jaxtyping"} | set(sys.stdlib_module_names)
    for name, path in modules().items():
        if name.split(".")[0] in TORCH_ONLY:
            foreign = {i.split(".")[0] for i in imports_of(path)} - allowed - LATE.get(name, set())
            assert not foreign, f"{name} imports {foreign}"


def test_import_proxstep_loads_nothing_heavy() -> None:
    code = (
        "import sys, proxstep; proxstep.Isopo, proxstep.algorithms.ALGORITHMS; "
        "heavy = {'transformers', 'trl', 'verl', 'ray', 'peft', 'accelerate', 'datasets', "
        "'pydantic', 'rich', "
        "'matplotlib', 'pandas'}; assert 'torch' in sys.modules; print(sorted(heavy & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
