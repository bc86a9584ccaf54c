"""Imports point one way, and `import proxstep` needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "proxstep"

LAYERS: list[tuple[str, ...]] = [
    ("errors", "types", "schema", "clock", "interrupt", "helptexts"),
    ("masked", "metrics", "chunked", "advantages", "losses", "theory", "regularizers", "rewards"),
    ("isopo", "tasks"),
    ("sections",),
    ("objective_sections", "regularizer_section"),
    ("config",),
    ("explain", "yamlfile"),
    (
        "recipes",
        "algorithm",
        "signals",
        "optimizers",
        "lm_head",
        "rollout",
        "scores",
        "data",
        "checkpoint",
        "tracking",
    ),
    ("supervised",),
    ("embedded",),
    ("models", "evaluation", "runfolder", "console"),
    ("generation", "penalties"),
    ("experience",),
    ("trainer",),
    ("session",),
    ("engines",),
    ("lab",),
    ("cli", "__main__"),
]
"""Maths, then layers and installation, the recipe, the local engine, other engines, the lab, the
command line.
"""

TORCH_ONLY = (
    "errors",
    "types",
    "schema",
    "masked",
    "metrics",
    "chunked",
    "advantages",
    "losses",
    "theory",
    "regularizers",
    "isopo",
)


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


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    found = [i for i, names in enumerate(LAYERS) if top in names]
    assert len(found) == 1, f"{module} is not in exactly one layer"
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
            if layer_of(target) > layer_of(name):
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
            foreign = {i.split(".")[0] for i in imports_of(path)} - allowed
            assert not foreign, f"{name} imports {foreign}"


def test_import_proxstep_loads_nothing_heavy() -> None:
    code = (
        "import sys, proxstep; proxstep.Isopo, proxstep.losses.LOSSES; "
        "heavy = {'transformers', 'trl', 'verl', 'ray', 'peft', 'accelerate', 'datasets', "
        "'pydantic', 'rich', "
        "'matplotlib', 'pandas'}; assert 'torch' in sys.modules; print(sorted(heavy & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
