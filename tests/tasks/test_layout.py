"""What stands around a question: instruction, system prompt, worked examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.config.recipe_case import mistake

from proxstep.config.loading import resolve
from proxstep.errors import ProxstepError
from proxstep.rewards import exact_match
from proxstep.tasks import Example, gsm8k_task, svamp_task, table_task
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.prompts import Prompts, load_prompts
from proxstep.training.task import load_task

WORDS = [{"question": f"{i} and 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(20)]
SUMS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]


@pytest.fixture
def write(tmp_path: Path):
    def write(rows, name="train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def recipe(path: str, name: str = "table", **task):
    section = {"name": name, "train": path, "num_validation": 4, **task}
    return resolve({"algorithm": "grpo", "model": {"name": "m"}, "task": section}, {}, "test")


def test_worked_examples_are_training_rows_that_are_left_out(write) -> None:
    path = write(WORDS)
    task = gsm8k_task(path, num_validation=4, num_few_shot=3)
    assert (len(task.train), len(task.validation)) == (13, 4)
    *shots, last = task.validation[0].prompt.split("\n\n")
    assert last.startswith("Question: 16 and 1? Let's think")
    asked = [shot.partition("Question: ")[2].partition("?")[0] for shot in shots]
    left = {example.question for example in task.train}
    everything = {row["question"] for row in WORDS[:16]}
    assert left | {f"{text}?" for text in asked} == everything
    assert all(
        shot.endswith(f"#### {int(a.split()[0]) + 1}") for shot, a in zip(shots, asked, strict=True)
    )
    for example in [*task.train, *task.validation]:  # the same ones everywhere, as a prefix
        assert example.prompt.startswith("\n\n".join(shots))


def test_the_seed_chooses_the_worked_examples(write) -> None:
    path = write(WORDS)
    first, again, other = (
        gsm8k_task(path, num_validation=4, num_few_shot=3, few_shot_seed=seed).validation[0].prompt
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_chat_gets_them_as_turns_after_the_system_prompt(write) -> None:
    rows = [{"Body": f"{i} cats.", "Question": "How many?", "Answer": i} for i in range(1, 9)]
    task = svamp_task(
        write(rows),
        num_validation=2,
        chat=True,
        instruction="Say a number.",
        system_prompt="You count.",
        num_few_shot=2,
    )
    prompt = task.validation[0].prompt
    assert [message["role"] for message in prompt] == ["system", *["user", "assistant"] * 2, "user"]
    assert prompt[0]["content"] == "You count."
    assert prompt[-1]["content"] == "7 cats. How many? Say a number."
    assert prompt[1]["content"] == f"{prompt[2]['content']} cats. How many? Say a number."


def test_a_system_prompt_needs_a_chat_without_one(write) -> None:
    with pytest.raises(ProxstepError, match="these prompts are plain text"):
        gsm8k_task(write(WORDS), num_validation=4, system_prompt="Hi.")
    rows = [{"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "1?"}]}]
    path = write([{**row, "answer": "1"} for row in rows * 3])
    with pytest.raises(ProxstepError, match="a system message of its own"):
        table_task(path, num_validation=1, system_prompt="Hi.")
    shots = table_task(path, num_validation=1, num_few_shot=1).train[0].prompt
    assert [m["role"] for m in shots] == ["system", "user", "assistant", "user"]
    with pytest.raises(ProxstepError, match="takes all 2 training rows"):
        table_task(path, num_validation=1, num_few_shot=2)


@pytest.mark.parametrize(
    ("prompt_format", "template", "chat"),
    [("auto", True, True), ("auto", False, False), ("chat", True, True), ("plain", True, False)],
)
def test_a_tables_texts_become_chats_where_the_tokenizer_has_a_template(
    write, prompt_format, template, chat
) -> None:
    made = load_task(recipe(write(SUMS), prompt_format=prompt_format), chat=template)
    assert made.train[0].prompt == ([{"role": "user", "content": "0+1="}] if chat else "0+1=")
    assert made.train[0].question == "0+1="


def test_plain_is_not_said_of_chats_and_nothing_stands_around_code(write) -> None:
    rows = [{"prompt": [{"role": "user", "content": "1?"}], "answer": "1"}] * 6
    with pytest.raises(ProxstepError, match=r"task\.prompt_format plain: prompt 1"):
        load_task(recipe(write(rows), prompt_format="plain"), chat=True)
    code = [{"prompt": "def f():\n", "answer": "  return 1", "test": "assert f() == 1"}] * 6
    graded = {"rewards": ["run_code_tests"]}
    assert load_task(recipe(write(code), **graded), chat=True).train[0].prompt == "def f():\n"
    with pytest.raises(ProxstepError, match="nothing may stand around it"):
        load_task(recipe(write(code), **graded, instruction="Be quick."), chat=True)


def test_arguments_reach_the_chat_template() -> None:
    tokenizer, _ = build_embedded_model()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinks %}+{% endif %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    examples = [Example([{"role": "user", "content": "1+2"}], "3")]
    for template, text in [({"thinks": True}, "1+2+="), ({"thinks": False}, "1+2="), ({}, "1+2=")]:
        prompts = Prompts(examples, tokenizer, [exact_match], [1.0], template)
        assert prompts.tokens(0) == tokenizer(text)["input_ids"]
    message = mistake(
        {
            "algorithm": "grpo",
            "model": {"name": "m"},
            "task": {"name": "gsm8k", "chat_template_kwargs": {"tokenize": True}},
        }
    )
    assert "tokenize is set by the engine" in message


def test_long_prompts_are_dropped_and_counted(write) -> None:
    tokenizer, _ = build_embedded_model()
    path = write([row for pair in zip(SUMS[:10], SUMS[10:], strict=True) for row in pair])
    made = recipe(path, drop_long_prompts=True, max_prompt_length=4)
    notes: list[str] = []
    task = load_task(made, chat=False)
    train, validation = load_prompts(made, tokenizer, task, notes.append)
    assert (len(train), len(validation)) == (8, 2)
    assert notes == [
        "task.drop_long_prompts: 8 of 16 train prompts have more than 4 tokens",
        "task.drop_long_prompts: 2 of 4 validation prompts have more than 4 tokens",
    ]
    assert max(len(train.tokens(i)) for i in range(8)) == 4
    with pytest.raises(ProxstepError, match="every prompt has more than"):
        load_prompts(recipe(path, drop_long_prompts=True, max_prompt_length=3), tokenizer, task)
    with pytest.raises(ProxstepError, match=r"or set task\.drop_long_prompts"):
        load_prompts(recipe(path, max_prompt_length=4), tokenizer, task)
