"""What people do with trainers in notebooks and in larger code bases, and other kinds of models."""

from __future__ import annotations

import copy
import dataclasses
import gc
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from peft import LoraConfig
from tests import models
from tests.engine import Silent, tiny_recipe
from tests.engines.trl_case import SIZES, Watch, copied, dataset, made, quiet, text_reward, tiny
from tests.engines.trl_case import trained as train
from tests.selection import slow
from trl import GRPOTrainer, TrlParser

from proxstep.engines.trl import (
    IsopoConfig,
    IsopoTrainer,
    OpoConfig,
    OpoTrainer,
    PolicyConfig,
    PolicyTrainer,
    launch,
)
from proxstep.engines.trl.configs import TRL_OPTIONS
from proxstep.errors import ProxstepError

SMALL: dict[str, Any] = {"gradient_accumulation_steps": 2, "gradient_checkpointing": False}
TRAINERS = [OpoTrainer, IsopoTrainer]


def gradients(watch: Watch) -> dict[str, torch.Tensor]:
    return watch.gradients[0]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def first_gradient(trainer_class: Any, folder: Path, model: Any, tokenizer: Any, **options: Any):
    trainer, watch = made(trainer_class, folder, model, tokenizer, **(SMALL | options))
    torch.manual_seed(0)
    train(trainer)
    return gradients(watch)


# -- configurations --------------------------------------------------------------------------------


@dataclasses.dataclass
class TeamPolicy(PolicyConfig):
    cluster: str = "a"


@dataclasses.dataclass
class TeamOpo(OpoConfig):
    cluster: str = "a"
    learning_rate: float = 3e-3


@dataclasses.dataclass
class TeamIsopo(IsopoConfig):
    cluster: str = "a"
    rule: str = "isopo-npg"


class Undecorated(TeamIsopo):
    """Without options of its own."""


SUBCLASSES = [
    (PolicyTrainer, TeamPolicy, {"loss_type": "gspo"}),
    (PolicyTrainer, OpoConfig, {}),
    (OpoTrainer, TeamOpo, {}),
    (IsopoTrainer, TeamIsopo, {}),
    (IsopoTrainer, Undecorated, {}),
]


@pytest.mark.parametrize(("trainer_class", "config_class", "options"), SUBCLASSES)
def test_subclasses_of_configurations(
    tmp_path: Path, trainer_class: Any, config_class: Any, options: dict[str, Any]
) -> None:
    tokenizer, model = tiny()
    with quiet():
        args = config_class(str(tmp_path), **(SIZES | options))
        trainer = trainer_class(model, text_reward, args, dataset(), processing_class=tokenizer)
        if config_class is not OpoConfig:
            line = f"--output_dir {tmp_path} --cluster b --bf16 False --use_cpu True".split()
            line += ["--loss_type", trainer.args.loss_type]
            (parsed,) = TrlParser(config_class).parse_args_and_config(line)
            assert (parsed.cluster, type(parsed)) == ("b", config_class)
    assert trainer.args is args
    if trainer_class is IsopoTrainer:
        assert trainer.isopo.rule == args.to_rule()
        assert args.rule == "isopo-npg"


@pytest.mark.parametrize("trainer_class", [PolicyTrainer, OpoTrainer])
def test_a_geometry_is_not_left_out(tmp_path: Path, trainer_class: Any) -> None:
    with quiet():
        args = TeamIsopo(str(tmp_path), **SIZES)
    with pytest.raises(ProxstepError, match=r"TeamIsopo.*(IsopoTrainer|OpoConfig)"):
        trainer_class("no/model", text_reward, args, dataset())


@pytest.mark.parametrize(
    ("name", "value"),
    [("epsilon", 0.3), ("fp16", True), ("rule", "none"), ("loss_type", "grpo"), ("damping", -1.0)],
)
def test_options_that_are_set_later(tmp_path: Path, name: str, value: Any) -> None:
    with quiet():
        args = IsopoConfig(str(tmp_path), **SIZES)
    setattr(args, name, value)
    with pytest.raises(ProxstepError, match=name):
        IsopoTrainer("no/model", text_reward, args, dataset())


# -- command lines and files -----------------------------------------------------------------------

OURS = [
    field
    for field in dataclasses.fields(IsopoConfig)
    if field.name not in TRL_OPTIONS or field.name == "loss_type"
]


def spelled(name: str) -> list[Any]:
    """Values that a command line can give an option; each of them is not the default."""
    hint = get_type_hints(IsopoConfig)[name]
    members = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) is Literal:
        return list(members)
    kind = members[0] if members else hint
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    special = {"num_overlap_positions": ["none", 7], "mu": ["auto", 2.5]}
    by_type = {bool: [True, False], float: [0.125], int: [7], str: ["a-word"]}
    return special.get(name, by_type[kind])


CASES = [(field.name, value) for field in OURS for value in spelled(field.name)]


@pytest.mark.parametrize("config_class", [PolicyConfig, OpoConfig, IsopoConfig])
def test_every_option_is_in_the_walk(config_class: Any) -> None:
    ours = {field.name for field in dataclasses.fields(config_class)} - TRL_OPTIONS
    assert ours <= {name for name, _ in CASES}
    assert len(CASES) > 50


@pytest.mark.parametrize("source", ["command line", "file"])
@pytest.mark.parametrize(("name", "value"), CASES)
def test_every_option_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, source: str
) -> None:
    """Read by TRL's parser: whether it fits the algorithm is another question."""
    read: dict[str, Any] = {}
    monkeypatch.setattr(IsopoConfig, "__post_init__", lambda self: read.update(vars(self)))
    line, parser = ["--output_dir", str(tmp_path)], PARSER
    if source == "file":
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({name: None if value == "none" else value}))
        line += ["--config", str(path)]
        parser = TrlParser(IsopoConfig)  # it keeps a file's values
    else:
        line += [f"--{name}", str(value)]
    parser.parse_args_and_config(line)
    found = read[name]
    if source == "file":
        assert found == (None if value == "none" else value)
    else:
        assert str(found) == str(value)


PARSER = TrlParser(IsopoConfig)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--num_overlap_positions none", {"num_overlap_positions": None}),
        ("--num_overlap_positions 7", {"num_overlap_positions": 7}),
        ("--loss_type opo --mu auto", {"mu": "auto"}),
        ("--loss_type opo --mu 2.5", {"mu": 2.5}),
        (
            "--loss_type opo --adaptive_tau True --tau_min 0.5",
            {"adaptive_tau": True, "tau_min": 0.5},
        ),
        ("--overlap_source microbatch", {"overlap_source": "microbatch"}),
    ],
)
def test_what_a_command_line_means(tmp_path: Path, options: str, expected: dict[str, Any]) -> None:
    line = f"--output_dir {tmp_path} --bf16 False --use_cpu True {options}"
    with quiet():
        (found,) = TrlParser(IsopoConfig).parse_args_and_config(line.split())
    for name, value in expected.items():
        of = found.geometry() if hasattr(found.geometry(), name) else found.objective()
        assert getattr(of, name) == value
        assert type(getattr(of, name)) is type(value)


# -- several trainers on one model -----------------------------------------------------------------


@pytest.mark.parametrize("then", slow(GRPOTrainer, IsopoTrainer, OpoTrainer))
def test_the_next_trainer_finds_an_ordinary_model(tmp_path: Path, then: Any) -> None:
    """However the one before ended: alive, deleted, or by an exception in a reward or a loss."""
    tokenizer, model = tiny()
    expected = first_gradient(then, tmp_path / "alone", copied(model), tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fails(completions: list[str], **columns: Any) -> list[float]:
        raise ConnectionError("the judge is away")

    waiting, _ = made(IsopoTrainer, tmp_path / "waiting", model, tokenizer, **SMALL)
    failing, _ = made(IsopoTrainer, tmp_path / "a", model, tokenizer, rewards=fails, **SMALL)
    with pytest.raises(ConnectionError):
        train(failing)
    del failing
    interrupted, _ = made(IsopoTrainer, tmp_path / "b", model, tokenizer, **SMALL)
    interrupted._coefficients = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(interrupted)
    gc.collect()
    finished, _ = made(IsopoTrainer, tmp_path / "c", model, tokenizer, **SMALL)
    train(finished)
    model.load_state_dict(before)
    assert_same(first_gradient(then, tmp_path / "then", model, tokenizer), expected)
    del interrupted._coefficients
    for trainer in (interrupted, waiting, finished):  # they can go on, each with its own past
        train(trainer)
        assert trainer.isopo.state_dict()["step"] == (2 if trainer is finished else 1)


@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [
        (OpoTrainer, {}),
        *slow(
            (IsopoTrainer, {}),
            (IsopoTrainer, {"rule": "isopo-natural"}),
            (IsopoTrainer, {"other_parameters": "freeze", "bf16": True}),
        ),
    ],
)
def test_a_copied_trainer_trains_its_own_model(
    tmp_path: Path, trainer_class: Any, options: dict[str, Any]
) -> None:
    """Its samples too: TRL's own forward of a copied model is the original's."""

    def trainer() -> Any:
        tokenizer, model = tiny()
        with quiet():
            args = trainer_class.config_class(str(tmp_path), **(SIZES | SMALL | options))
            return trainer_class(model, text_reward, args, dataset(), processing_class=tokenizer)

    def run(trainer: Any) -> dict[str, torch.Tensor]:
        watch = Watch(model=trainer.model)
        trainer.add_callback(watch)
        torch.manual_seed(0)
        train(trainer)
        return gradients(watch) | {"reward": torch.tensor(watch.logs[0]["reward"])}

    original = trainer()
    copies = copy.deepcopy(original), copy.deepcopy(copy.deepcopy(original))
    with torch.no_grad():
        for parameter in original.model.parameters():
            parameter.zero_()
    expected = run(trainer())
    for each in copies:
        assert_same(run(each), expected)
    assert not any(parameter.any() for parameter in original.model.parameters())


# -- metrics ---------------------------------------------------------------------------------------

LOSS_PATHS: dict[str, dict[str, Any]] = {
    "entropy_coef": {"entropy_coef": 0.1},
    "beta": {"beta": 0.1},
    "both": {"beta": 0.1, "entropy_coef": 0.1},
    "iterations": {"num_iterations": 2, "max_steps": 2},
    "all completions masked": {
        "mask_truncated_completions": True,
        "max_completion_length": 2,
        "generation_kwargs": {"suppress_tokens": [0, 1]},  # padding and end
    },
    "aggregation": {"loss_agg_mode": "token-mean"},
    "advantage": {"advantage": "batch-normalized"},
}
OF_OPTIONS = {"kl", "entropy_coef"}
"""What TRL logs of an option alone."""


FAST = ("both", "all completions masked")


@pytest.mark.parametrize(
    ("trainer_class", "cases"),
    [(OpoTrainer, FAST), *slow((IsopoTrainer, tuple(LOSS_PATHS)), (OpoTrainer, tuple(LOSS_PATHS)))],
)
def test_the_same_metrics_whatever_the_options(
    tmp_path: Path, trainer_class: Any, cases: tuple[str, ...]
) -> None:
    logs = {}
    for case in ("none", *cases):
        options = LOSS_PATHS.get(case, {})
        tokenizer, model = tiny(lora="beta" in options)
        trainer, watch = made(trainer_class, tmp_path, model, tokenizer, **(SMALL | options))
        train(trainer)
        logs[case] = watch.logs[0]
    plain = {name for name in logs["none"] if not name.startswith("geometry/")}
    assert "policy_loss" in plain
    for case, log in logs.items():
        names = {name for name in log if not name.startswith("geometry/")}
        assert names - OF_OPTIONS == plain, case
        if case not in ("beta", "both", "entropy_coef"):
            assert log["policy_loss"] == pytest.approx(log["loss"], abs=1e-4)
    both = logs["both"]
    others = 0.1 * both["kl"] - 0.1 * both["entropy"]
    assert both["loss"] - both["policy_loss"] == pytest.approx(others, rel=0.2)
    assert logs["all completions masked"]["policy_loss"] == 0


# -- mixtures of experts ---------------------------------------------------------------------------


def mixture(tokenizer: Any, vocabulary: int) -> Any:
    torch.manual_seed(1)
    model: Any = models.qwen3_moe()
    config = copy.deepcopy(model.config)
    config.vocab_size = vocabulary
    model = models.randomized(type(model)(config))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return models.finish(model, torch.float32, exact=False)


def test_a_mixture_s_router_loss_keeps_its_plain_gradient(tmp_path: Path) -> None:
    """Beside ISOPO's, nothing has to be turned off."""
    tokenizer, dense = tiny()
    model = mixture(tokenizer, dense.config.vocab_size)
    assert model.config.router_aux_loss_coef > 0
    found, without = (copied(model), copied(model))
    trainer, watch = made(
        IsopoTrainer, tmp_path, found, tokenizer, **SMALL, router_aux_loss_coef=0.5
    )
    torch.manual_seed(0)
    train(trainer)
    expected = first_gradient(IsopoTrainer, tmp_path, without, tokenizer, router_aux_loss_coef=0.0)
    for batch in watch.microbatches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        out = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        (0.5 * out.aux_loss / len(watch.microbatches)).backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert max(float(value.abs().max()) for value in plain.values()) > 1e-4
    assert watch.logs[0]["aux_loss"] > 0
    for name, value in gradients(watch).items():
        both = expected[name] + plain.get(name, 0.0)
        torch.testing.assert_close(value, both, rtol=1e-4, atol=1e-5)


LORA = {"rank": 2, "target_modules": "all-linear"}


# -- the seed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "lora"), slow(("isopo", LORA), ("grpo", LORA), ("grpo", None), ("isopo", None))
)
def test_the_same_recipe_begins_the_same(
    tmp_path: Path, algorithm: str, lora: dict[str, Any] | None
) -> None:
    """Whatever drew random numbers before: GRPOTrainer of TRL is the first, ours the second."""
    norms = []
    for disturbed in (1, 2):
        torch.manual_seed(disturbed)
        recipe = tiny_recipe(
            *(tmp_path / str(disturbed), algorithm),
            steps=1,
            device="cpu",
            task={"rewards": [f"{__file__}:length"]},
            model={"lora": lora},
            evaluation={"every": 10, "kl_policy_initial": False},
        )
        with quiet():
            assert launch.train(recipe, Silent()) == "finished"
        lines = (tmp_path / str(disturbed) / "metrics.jsonl").read_text().splitlines()
        norms.append(yaml.safe_load(lines[-1])["grad_norm"])
    assert norms[0] > 0
    assert norms[0] == norms[1]


@pytest.mark.parametrize("trainer_class", [*TRAINERS])
def test_adapters_are_drawn_from_the_seed(tmp_path: Path, trainer_class: Any) -> None:
    drawn = []
    for disturbed, seed in ((1, 0), (2, 0), (1, 1)):
        tokenizer, model = tiny()
        torch.manual_seed(disturbed)
        adapters = LoraConfig(r=2, target_modules=["q_proj"])
        trainer, _ = made(
            trainer_class, tmp_path, model, tokenizer, peft_config=adapters, seed=seed
        )
        state = trainer.model.state_dict()
        drawn.append(next(value for name, value in state.items() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [sum(ord(letter) for letter in text) % 7 / 3 for text in completions]
