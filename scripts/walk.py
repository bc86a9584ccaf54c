"""Count what a reader walks through: files, functions and returns behind one piece of work.

    python scripts/walk.py step --algorithm reinforce     # one training step
    python scripts/walk.py step --algorithm isopo
    python scripts/walk.py linear                         # the gradient of one linear layer
    python scripts/walk.py loss gspo                      # one objective's loss
    python scripts/walk.py loss opo --function opo_signal # what it prepares of a rollout
    python scripts/walk.py floors                         # imports, and lines of each room

All but `floors`, which reads the files, follow the calls of the package's functions with
`sys.setprofile`.

- *files*, *functions*: how many different ones are entered. Lambdas and functions within another
  count for themselves; comprehensions and generator expressions belong to the function around them.
- *returns*: for a reader who looks up every function once, in the order of their first calls, how
  often the next one stands in a file that was read in before and is not the one just read.
- *depth*: the most functions that are open at a time, the first included.

What is followed is found at run time. A step is the innermost call in which the model is run
without gradients more than once (completions are sampled token by token) and an optimizer takes a
step: the second of a run of three, so that what a run does once is over. A linear layer's gradient
is the first `backward` of an autograd Function that returns the gradient of an input of I features
together with a matrix of I columns, in a model of two linear layers under `Isopo`. A loss is the
first call, in the run's second step, of the function that bears the objective's name. So nothing
here names a module of the package: the script measures the code before and after a move.

Floors are the longest chain of imports, those for type checkers left out: once of modules, once of
rooms, which are the folders and the modules directly in the package.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import proxstep
from proxstep import Isopo
from proxstep.__main__ import main as proxstep_main

PACKAGE = Path(proxstep.__file__).parent
RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic.yaml"
OPTIONS = {
    "steps": 3,
    "device": "cpu",
    "task.num_validation": 4,
    "rollout.num_prompts": 4,
    "evaluation.every": 100,
    "evaluation.num_probe_prompts": 4,
}
NO_FUNCTIONS = ("<module>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


@dataclass
class Call:
    """One call of a function of the package.

    Attributes:
        file: Its file, relative to the package.
        function: Its name within the file, and its line.
        name: Its own name.
        calls: The calls of the package's functions that it made, directly or through others.
        num_forwards: How often a whole model was run without gradients, here and below.
        num_steps: How many steps optimizers took, here and below.
        result: Shapes of the tensors that it returned in a tuple, None for anything else.
    """

    file: str
    function: str
    name: str
    calls: list[Call] = field(default_factory=list)
    num_forwards: int = 0
    num_steps: int = 0
    result: list[tuple[int, ...] | None] | None = None

    def everything(self) -> Iterator[Call]:
        """Yield this call and all below it, in the order in which they were made."""
        yield self
        for call in self.calls:
            yield from call.everything()

    def depth(self) -> int:
        """Return the most functions that are open at a time."""
        return 1 + max((call.depth() for call in self.calls), default=0)


def follow(work: Callable[[], Any]) -> Call:
    """Return the calls of the package's functions that some work makes, below an empty call."""
    root = Call("", "", "")
    stack, known = [root], {}

    def profile(frame: FrameType, event: str, result: Any) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code not in known:
            known[code] = _place(code)
        if known[code] is None:
            return
        if event == "call":
            call = Call(*known[code])
            stack[-1].calls.append(call)
            stack.append(call)
        elif len(stack) > 1:
            call = stack.pop()
            if call.name == "backward" and isinstance(result, tuple):
                shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in result]
                call.result = shapes

    def count_forward(module: nn.Module, inputs: Any) -> None:
        if hasattr(module, "generate") and not torch.is_grad_enabled():
            for call in stack:
                call.num_forwards += 1

    def count_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        for call in stack:
            call.num_steps += 1

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(count_forward),
        register_optimizer_step_post_hook(count_step),
    )
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        for hook in hooks:
            hook.remove()
    return root


def _place(code: CodeType) -> tuple[str, str, str] | None:
    """Return file, function and own name; None for what is not followed."""
    path = Path(code.co_filename)
    if not path.is_relative_to(PACKAGE) or code.co_name in NO_FUNCTIONS:
        return None
    function = f"{code.co_qualname}:{code.co_firstlineno}"
    return str(path.relative_to(PACKAGE)), function, code.co_name


def train(algorithm: str) -> Call:
    """Return the calls of a run of three small steps."""
    with tempfile.TemporaryDirectory() as folder:
        keys = {**OPTIONS, "algorithm": algorithm, "output_dir": folder}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        statuses: list[int] = []
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            calls = follow(lambda: statuses.append(proxstep_main(["train", str(RECIPE), *words])))
    if statuses != [0]:
        raise SystemExit(f"the run of {algorithm} failed: {output.getvalue()[-500:]}")
    return calls


def second_step(calls: Call) -> Call:
    """Return the second training step of a run."""
    steps = [call for call in calls.everything() if _is_step(call)]
    steps = [call for call in steps if not any(_is_step(below) for below in call.calls)]
    if len(steps) != OPTIONS["steps"]:
        raise SystemExit(f"found {len(steps)} training steps in a run of {OPTIONS['steps']}")
    return steps[1]


def _is_step(call: Call) -> bool:
    return call.num_forwards > 1 and call.num_steps > 0


def linear_gradient() -> Call:
    """Return the calls of the gradient of a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))
    isopo = Isopo(model, rule="isopo")
    sequence_ids = torch.arange(4)[:, None].expand(4, 3)

    def backward() -> None:
        with isopo.microbatch(sequence_ids, torch.randn(4)) as microbatch:
            log_prob_BTV = model(torch.randn(4, 3, 6)).log_softmax(-1)
            microbatch.objective(log_prob_BTV[..., 0]).backward()
        isopo.step()

    backward()  # once before: what happens once is over
    for call in follow(backward).everything():
        shapes = [shape for shape in call.result or [] if shape is not None]
        if len(shapes) > 1 and len(shapes[1]) == 2 and shapes[0][-1] == shapes[1][1]:
            return call
    raise SystemExit("found no backward of a linear layer")


def loss(algorithm: str, function: str) -> Call:
    """Return the calls of an objective's loss in a training step."""
    for call in second_step(train(algorithm)).everything():
        if call.name == function:
            return call
    raise SystemExit(f"the step called no function named {function}; give --function")


def describe(call: Call) -> str:
    """Return the figures of a call, and its files in the order in which they are first opened."""
    functions = list(dict.fromkeys((c.file, c.function) for c in call.everything()))
    files = list(dict.fromkeys(file for file, _ in functions))
    returns, seen, current = 0, set(), None
    for file, _ in functions:
        returns += file != current and file in seen
        seen.add(file)
        current = file
    return (
        f"{len(files)} files, {len(functions)} functions, {returns} returns to a file already "
        f"left, depth {call.depth()}; from {call.function} in {call.file}\n  {' '.join(files)}"
    )


def modules() -> dict[str, Path]:
    """Return the package's modules by their dotted names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the package's modules that a file imports, anywhere but for type checkers alone."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in known else node.module for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text("utf-8")))
    return found & known.keys()


def longest_chain(edges: dict[str, set[str]]) -> tuple[str, ...]:
    """Return the longest chain of imports.

    Raises:
        SystemExit: If imports go in a circle.
    """
    chains: dict[str, tuple[str, ...]] = {}

    def chain(name: str, above: tuple[str, ...]) -> tuple[str, ...]:
        if name in above:
            raise SystemExit(f"imports in a circle: {' > '.join((*above, name))}")
        if name not in chains:
            below = [chain(target, (*above, name)) for target in sorted(edges[name])]
            chains[name] = (name, *max(below, key=len, default=()))
        return chains[name]

    return max((chain(name, ()) for name in sorted(edges)), key=len)


def floors() -> str:
    """Return the longest chains of imports, and the lines of each room."""
    known = modules()
    edges = {name: imports_of(path, known) - {name} for name, path in known.items()}
    by_room: dict[str, set[str]] = {}
    for name, targets in edges.items():
        if name != PACKAGE.name:
            found = by_room.setdefault(name.split(".")[1], set())
            found.update(target.split(".")[1] for target in targets if "." in target)
            found.discard(name.split(".")[1])
    lines = []
    for what, chain in (("module", longest_chain(edges)), ("room", longest_chain(by_room))):
        lines.append(f"{len(chain)} floors, by {what}: {' > '.join(chain)}")
    rooms: dict[str, list[int]] = defaultdict(list)
    for path in known.values():
        parts = path.relative_to(PACKAGE).parts
        rooms[parts[0] if len(parts) > 1 else "(top)"].append(len(path.read_text().splitlines()))
    lines += ["", "room, files, lines"]
    lines += [f"{room:12}{len(sizes):4}{sum(sizes):7}" for room, sizes in sorted(rooms.items())]
    total = sum(map(sum, rooms.values()))
    return "\n".join([*lines, f"{'all':12}{len(known):4}{total:7}"])


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    step = what.add_parser("step", help="one training step")
    step.add_argument("--algorithm", default="isopo")
    what.add_parser("linear", help="the gradient of one linear layer")
    one_loss = what.add_parser("loss", help="one objective's loss")
    one_loss.add_argument("algorithm")
    one_loss.add_argument("--function", help="its name, where it is not the objective's")
    what.add_parser("floors", help="chains of imports, and lines of each room")
    arguments = parser.parse_args()
    if arguments.what == "floors":
        print(floors())
    elif arguments.what == "linear":
        print(describe(linear_gradient()))
    elif arguments.what == "step":
        print(describe(second_step(train(arguments.algorithm))))
    else:
        name = arguments.algorithm.replace("-", "_")
        print(describe(loss(arguments.algorithm, arguments.function or name)))


if __name__ == "__main__":
    main()
