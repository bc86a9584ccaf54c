"""A recipe as a Python script of TRL's, for people to edit and to launch as they like."""

from __future__ import annotations

from proxstep.config.recipe import Recipe
from proxstep.engines.keys import Refusal, refuse
from proxstep.engines.trl.expressions import Call, Code, Name, Shared, imports_of, write
from proxstep.engines.trl.translation import Translation, translate
from proxstep.training.task import asks_tokenizer

_HEAD = '''"""{algorithm} on {task}, in TRL.

    python train.py
    torchrun --nproc_per_node 2 train.py

Made by `proxstep train --engine trl --print-command`, which trains the same weights; it adds the
run folder and the greedy evaluation.
"""

'''

_ONLY_RUN: tuple[Refusal, ...] = (
    (
        "external_lib",
        lambda recipe: recipe.external_lib is not None,
        "a printed script imports nothing of yours; run it without --print-command, or import the "
        "file in a script of your own before proxstep.engines.trl",
    ),
    (
        "task.drop_long_prompts",
        lambda recipe: recipe.task.drop_long_prompts,
        "a printed script has no limit on prompts; run it without --print-command, or drop the "
        "rows from the data",
    ),
)


def script(recipe: Recipe) -> str:
    """Return a script that trains as `proxstep train --engine trl` does.

    Raises:
        ProxstepError: If TRL cannot do what the recipe says.
    """
    refuse("trl", recipe, _ONLY_RUN)
    section, asks = recipe.task, asks_tokenizer(recipe)
    chat = Code("tokenizer.chat_template is not None")
    made = translate(recipe, chat=chat if asks else False)
    lines = [_HEAD.format(algorithm=recipe.algorithm, task=section.name)]
    lines.append(_imports(made, asks=asks))
    if _is_shared(made):
        lines.append('world_size = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun\n')
    model = write(made.model)
    lines.append(
        f"model = str({model})\n" if isinstance(made.model, Call) else f"model = {model}\n"
    )
    if asks:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(model)\n")
    lines.append(f"task = {write(made.task)}\n")
    if made.lora is not None:
        lines.append(f"set_seed({recipe.seed})  # TRL 1.14 draws adapters before it does so\n")
    arguments = {
        "model": Code("model"),
        "reward_funcs": made.rewards,
        "args": made.args,
        "train_dataset": Code("Dataset.from_list(rows(task.train))"),
        **({} if made.lora is None else {"peft_config": made.lora}),
    }
    lines.append(f"trainer = {write(Call(made.trainer, arguments))}\n")
    lines.append("trainer.train()\n")
    lines.append("trainer.accelerator.end_training()  # leaves torchrun's process group\n")
    return "".join(lines)


def _is_shared(made: Translation) -> bool:
    return any(isinstance(value, Shared) for value in made.args.keywords.values())


def _imports(made: Translation, *, asks: bool) -> str:
    """Return the import statements, the standard library's first and ours last."""
    names = imports_of([made.trainer, made.args, made.model, made.task, *made.rewards, made.lora])
    names |= imports_of([Name("datasets", "Dataset"), Name("proxstep.engines.trl.rows", "rows")])
    if asks:
        names.add(("transformers", "AutoTokenizer"))
    if made.lora is not None:
        names.add(("transformers", "set_seed"))
    by_module: dict[str, list[str]] = {}
    for module, name in sorted(names):
        by_module.setdefault(module, []).append(name)
    statements = [
        f"from {module} import {', '.join(by_module[module])}\n"
        for module in sorted(by_module, key=lambda module: (module.startswith("proxstep"), module))
    ]
    first = next(i for i, line in enumerate(statements) if line.startswith("from proxstep"))
    statements.insert(first, "\n")
    standard = "import os\n\n" if _is_shared(made) else ""
    return standard + "".join(statements) + "\n"
