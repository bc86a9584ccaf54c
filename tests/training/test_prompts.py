from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from proxstep.config.loading import resolve
from proxstep.errors import ProxstepError
from proxstep.rewards import exact_match, load_reward
from proxstep.tasks import Example, arithmetic_task, table_task
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.models import load_tokenizer
from proxstep.training.prompts import (
    Prompts,
    appends_end,
    batch_rows,
    encode_prompt,
    load_prompts,
    load_rewards,
)


@pytest.mark.parametrize(("num_rows", "num_per_batch"), [(10, 3), (4, 4), (3, 8), (1, 2)])
def test_every_epoch_visits_every_row_once(num_rows: int, num_per_batch: int) -> None:
    drawn = [
        row for batch in range(24) for row in batch_rows(num_rows, num_per_batch, batch, seed=7)
    ]
    for start in range(0, len(drawn) - num_rows + 1, num_rows):
        assert sorted(drawn[start : start + num_rows]) == list(range(num_rows))


def test_rows_follow_from_seed_and_batch_alone() -> None:
    assert batch_rows(50, 8, 5, seed=1) == batch_rows(50, 8, 5, seed=1)
    assert batch_rows(50, 8, 5, seed=1) != batch_rows(50, 8, 5, seed=2)
    assert Counter(batch_rows(50, 50, 0, 1)) == Counter(batch_rows(50, 50, 1, 1))


def test_chats_go_through_the_template_once() -> None:
    tokenizer, _ = build_embedded_model()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    chat = [{"role": "user", "content": "1+2"}]
    assert encode_prompt(tokenizer, chat) == encode_prompt(tokenizer, "1+2=")


def ending(tokenizer):
    """The tokenizer with a post-processor that appends the end token."""
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def test_a_prefill_is_the_prompts_last_text() -> None:
    """Of a plain prompt and of a chat, whose turn of the assistant begins with it."""
    tokenizer, _ = build_embedded_model()
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}"
    )
    chat = [{"role": "user", "content": "1+2"}]
    prompts = Prompts(
        [Example("1+2=", "3"), Example(chat, "3")], tokenizer, [exact_match], [1.0], prefill="4"
    )
    expected = tokenizer("1+2=4")["input_ids"]
    assert [prompts.tokens(row) for row in range(2)] == [expected] * 2
    assert prompts.grade([0, 1], ["3", "43"]).total == [1.0, 0.0]


def test_no_prompt_ends_with_an_end_that_the_tokenizer_appends() -> None:
    plain, tokenizer = build_embedded_model()[0], ending(build_embedded_model()[0])
    assert tokenizer("1+2=")["input_ids"][-1] == tokenizer.eos_token_id
    assert not appends_end(plain)
    assert encode_prompt(tokenizer, "1+2=") == encode_prompt(plain, "1+2=")
    assert Prompts([Example("1+2=", "3")], tokenizer, [exact_match], [1.0]).tokens(0) == (
        encode_prompt(plain, "1+2=")
    )
    own = f"1+2={plain.eos_token}"  # one that the data itself has stays
    assert encode_prompt(plain, own)[-1] == plain.eos_token_id


def test_a_chat_that_ends_with_the_assistants_words_is_refused() -> None:
    tokenizer, _ = build_embedded_model()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    prompts = Prompts([Example(chat[:1], "3"), Example(chat, "3")], tokenizer, [exact_match], [1.0])
    with pytest.raises(ProxstepError, match="rows row 2: the chat ends with an assistant's"):
        prompts.check(64, "rows")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer, model = build_embedded_model()
    model.config.save_pretrained(tmp_path)
    tokenizer.add_tokens([f"<{i}>" for i in range(model.config.vocab_size)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ProxstepError, match="resize_token_embeddings"):
        load_tokenizer(str(tmp_path))


def test_rewards_see_the_columns_and_chats_as_messages() -> None:
    seen = {}

    def spy(prompts, completions, answer, hint, **columns):
        seen.update(
            prompts=prompts, completions=completions, answer=answer, hint=hint, more=columns
        )
        return [1.0] * len(prompts)

    tokenizer, _ = build_embedded_model()
    chat = [{"role": "user", "content": "1+1"}]
    examples = [
        Example("1+2=", "3", columns={"hint": "h"}),
        Example(chat, "2", columns={"level": 4}),
    ]
    prompts = Prompts(examples, tokenizer, [spy, exact_match], [1.0, 0.5])
    table = prompts.grade([1, 0], ["2", "4"])
    assert table.total == [1.5, 1.0]
    assert seen["prompts"] == [chat, "1+2="]
    assert seen["completions"] == [[{"role": "assistant", "content": "2"}], "4"]
    assert seen["answer"] == ["2", "3"]
    assert seen["hint"] == [None, "h"]
    assert seen["more"] == {"level": [4, None]}


def test_builtin_reward_by_name() -> None:
    assert load_reward("exact_match") is exact_match


@pytest.mark.parametrize("name", ["overlong", "kl"])
def test_a_reward_does_not_take_the_name_of_what_is_added(tmp_path: Path, name: str) -> None:
    file = tmp_path / "reward.py"
    file.write_text(f"def {name}(prompts, completions, **columns):\n    return [1.0]\n")
    recipe = resolve({"algorithm": "grpo", "task": {"rewards": [f"{file}:{name}"]}}, {}, "test")
    with pytest.raises(ProxstepError, match=f"a reward function is named '{name}'"):
        load_rewards(recipe, arithmetic_task(1, 4))


def test_a_reward_is_checked_with_the_columns_of_every_row(tmp_path: Path) -> None:
    """Before the run, and not at the first batch with a row that has more."""
    file, data = tmp_path / "reward.py", tmp_path / "data.jsonl"
    file.write_text("def narrow(prompts, completions, answer):\n    return [1.0]\n")
    data.write_text('{"prompt": "1", "answer": 1}\n' * 2 + '{"prompt": "1", "answer": 1, "x": 2}\n')
    recipe = resolve({"algorithm": "grpo", "task": {"rewards": [f"{file}:narrow"]}}, {}, "test")
    with pytest.raises(ProxstepError, match=r"'narrow' does not accept the data's columns .*x"):
        load_rewards(recipe, table_task(data, num_validation=1))


@pytest.mark.parametrize(
    ("rows", "shared"), [([1, 2, 3, 4], None), ([1, 3, 3, 4], 1), ([1] * 4, 2)]
)
def test_validation_prompts_that_are_trained_on_are_counted(
    tmp_path: Path, rows: list[int], shared: int | None
) -> None:
    data, notes = tmp_path / "data.jsonl", []
    data.write_text("".join(f'{{"prompt": "{row}+1=", "answer": 1}}\n' for row in rows))
    recipe = resolve({"algorithm": "grpo", "task": {}}, {}, "test")
    tokenizer, _ = build_embedded_model()
    load_prompts(recipe, tokenizer, table_task(data, num_validation=2), notes.append)
    told = f"{shared} of 2 validation prompts are training prompts too"
    assert [note.split(":")[0] for note in notes] == ([told] if shared else [])
