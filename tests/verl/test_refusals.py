"""What cannot work is refused at start-up, each with one message: the field and the remedy."""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from tests import models
from tests.verl.verl_case import Case, actor_config, made_engine, saved_model
from tests.verl.verl_data import quiet
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import FSDPEngineConfig, MtpConfig, PolicyLossConfig

import verl
from proxstep.algorithms import ALGORITHMS
from proxstep.config.loading import load_recipe
from proxstep.config.releases import check_verl
from proxstep.engines.verl import (
    BudgetActorConfig,
    BudgetEngineConfig,
    IsopoActorConfig,
    IsopoEngineConfig,
    OpoPolicyLossConfig,
)
from proxstep.engines.verl.overrides import Prepared, gpus, overrides
from proxstep.engines.verl.refusals import sequence_losses
from proxstep.engines.verl.seams import loss_mode
from proxstep.errors import ProxstepError

pytestmark = pytest.mark.verl

TOKEN_LOSSES = (
    *("vanilla", "dppo_tv", "dppo_kl", "sapo", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"),
    *("unheard_of", "chi2_no_policy_term"),
    *(loss_mode(found) for found in ALGORITHMS.values() if found.level == "token"),
)


def refused(case: Case, message: str) -> None:
    with pytest.raises(ProxstepError, match=message) as caught:
        actor_config(case)
    assert "\n" not in str(caught.value)


# -- by the actor's configuration, before any process is started -----------------------------------


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_level_losses(name: str) -> None:
    case = Case("", policy_loss={"loss_mode": name})
    refused(
        case,
        rf"policy_loss.loss_mode is '{name}'; .* use gpg, gspo, bypass_mode, proxstep_reinforce",
    )


def test_all_of_verls_losses_are_known() -> None:
    """A loss that a new release adds is one or the other."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    assert set(POLICY_LOSS_REGISTRY) == {*sequence_losses(), *TOKEN_LOSSES} - {"unheard_of"}


def test_clipping_in_bypass_mode() -> None:
    refused(
        Case("", policy_loss={"loss_mode": "bypass_mode"}), "loss_type is 'ppo_clip'.*reinforce"
    )


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        ({"use_fused_kernels": True}, "model.use_fused_kernels=False"),
        ({"ulysses_sequence_parallel_size": 2}, "ulysses_sequence_parallel_size.*whole sequences"),
        ({"use_prefix_grouper": True}, "use_prefix_grouper"),
        ({"calculate_sum_pi_squared": True}, "calculate_sum_pi_squared"),
        ({"strategy": "fsdp"}, "strategy is 'fsdp'.*actor.strategy=isopo"),
        ({"strategy": "megatron"}, "strategy is 'megatron'.*actor.strategy=isopo"),
    ],
)
def test_options_of_the_actor(actor: dict[str, Any], message: str) -> None:
    refused(Case("", actor=actor), message)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"ulysses_sequence_parallel_size": 2}, "fsdp_config.ulysses_sequence_parallel_size"),
        ({"mixed_precision": {"param_dtype": "fp16"}}, "fsdp_config.mixed_precision.*bf16 or fp32"),
        ({"model_dtype": "float16"}, "fsdp_config.model_dtype.*bf16 or fp32"),
    ],
)
def test_options_of_fsdp(engine: dict[str, Any], message: str) -> None:
    refused(Case("", engine=engine), message)


def test_quantization() -> None:
    from verl.workers.config.engine import QATEngineConfig

    refused(Case("", engine={"qat": QATEngineConfig(enable=True)}), "fsdp_config.qat.enable")


@pytest.mark.parametrize("rule", ["isopo-natural", "proma", "proma-intra"])
def test_a_rule_that_mixes_a_micro_batch_and_batches_by_length(rule: str) -> None:
    case = Case("", geometry={"rule": rule}, actor={"use_dynamic_bsz": True})
    refused(case, f"use_dynamic_bsz and geometry.rule {rule}")


def test_another_rule_and_batches_by_length() -> None:
    actor_config(Case("", geometry={"rule": "isopo"}, actor={"use_dynamic_bsz": True}))


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"rule": "none"}, 'geometry.rule is "none"'),
        ({"rule": "isopo5"}, "geometry.rule is 'isopo5'"),
        ({"rules": "isopo"}, r"geometry.rules is not an option; did you mean rule\?"),
        ({"kl_budget": 0.03}, "geometry.kl_budget is not an option .*known here: rule, "),
        ({"diagnose_every": 3}, "geometry.diagnose_every is an option of the local engine"),
        ({"rule": "isopo-natural", "damping": 1.0}, "actor.geometry.damping is not an option of"),
        ({"decay": 2.0}, "geometry.decay is 2.0"),
    ],
)
def test_keys_of_the_geometry(geometry: dict[str, Any], message: str) -> None:
    refused(Case("", geometry=geometry), message)


def test_a_loss_of_ours_without_its_class() -> None:
    case = Case("", actor={"policy_loss": PolicyLossConfig(loss_mode="chi2_opo")})
    refused(case, r"policy_loss._target_=proxstep.engines.verl.OpoPolicyLossConfig")


# -- by the engine, before the model is built ------------------------------------------------------


@pytest.fixture
def case(tmp_path: Path) -> Case:
    saved_model(tmp_path / "model")
    return Case(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"use_fused_kernels": True}, "model.use_fused_kernels"),
        ({"use_liger": True}, "model.use_liger"),
        ({"tiled_mlp": {"enabled": True, "num_shards": 2}}, "model.tiled_mlp.enabled"),
        ({"enable_activation_offload": True}, "model.enable_activation_offload"),
        ({"mtp": MtpConfig(enable=True)}, "model.mtp.enable"),
    ],
)
def test_options_of_the_model(case: Case, model: dict[str, Any], message: str) -> None:
    case.model = model
    with pytest.raises(ProxstepError, match=message):
        made_engine(case)


def test_a_plain_configuration(case: Case) -> None:
    """`strategy=isopo` alone: verl hands our engine its own configuration class."""
    case.geometry = None
    with pytest.raises(ProxstepError, match=r"actor\._target_=proxstep\.engines\.verl\.IsopoActor"):
        made_engine(case, strategy="isopo")


def test_experts_in_three_dimensions_are_covered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with quiet():
        models.qwen3_moe().save_pretrained(tmp_path)
    made_engine(Case(str(tmp_path)))


# -- releases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["0.9.0", "0.8.2", "0.10.0", "1.0", None])
def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("proxstep.config.releases.version", version)
    with pytest.raises(
        ProxstepError, match=r'pip install "proxstep\[verl\]" \(verl>=0.9.1,<0.10\)'
    ):
        check_verl()


@pytest.mark.parametrize("found", ["0.9.1", "0.9.2", "0.9.1.post1"])
def test_these_are_supported(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr("proxstep.config.releases.version", lambda name: found)
    check_verl()


def test_beside_trl_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    releases = {"verl": "0.9.1", "trl": "1.16.0"}
    monkeypatch.setattr("proxstep.config.releases.version", releases.__getitem__)
    with pytest.raises(ProxstepError, match=r"TRL 1.16.0, .* environment of its own"):
        check_verl()


# -- verl's own configuration files ----------------------------------------------------------------


def composed(*overrides: str) -> Any:
    """The actor's part of `command`."""
    return command(*overrides).actor_rollout_ref.actor


def command(*overrides: str) -> Any:
    """verl's whole configuration with these overrides, as its main program makes it."""
    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(folder, version_base=None):
        return hydra.compose("ppo_trainer", list(overrides))


ACTOR = "actor_rollout_ref.actor."
SIZES = (f"{ACTOR}ppo_micro_batch_size_per_gpu=2",)
OPO = (
    f"{ACTOR}policy_loss._target_=proxstep.engines.verl.OpoPolicyLossConfig",
    f"{ACTOR}policy_loss.loss_mode=chi2_opo",
)
ISOPO = (f"{ACTOR}strategy=isopo", f"{ACTOR}_target_=proxstep.engines.verl.IsopoActorConfig")
EXTERNAL = "actor_rollout_ref.model.external_lib=proxstep.engines.verl"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"model.external_lib is not set.*model.external_lib=proxstep.engines.verl$"),
        ([EXTERNAL, "actor_rollout_ref.model.use_liger=True"], "model.use_liger and ISOPO"),
        ([EXTERNAL, "actor_rollout_ref.model.mtp.enable=True"], "model.mtp.enable and ISOPO"),
        ([EXTERNAL], None),
    ],
)
def test_the_command_line_as_a_whole(words: list[str], message: str | None) -> None:
    """What verl's main program checks before it starts Ray."""
    config = command(*SIZES, *ISOPO, f"{ACTOR}policy_loss.loss_mode=gpg", *words)
    config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu = 2
    with nullcontext() if message is None else pytest.raises(ProxstepError, match=message):
        validate_config(config, use_reference_policy=False, use_critic=False)


def test_the_documented_overrides() -> None:
    actor = omega_conf_to_dataclass(composed(*SIZES, *OPO, f"+{ACTOR}policy_loss.alpha=0.3"))
    assert isinstance(actor.policy_loss, OpoPolicyLossConfig)
    assert actor.policy_loss.section().alpha == 0.3
    keys = (f"+{ACTOR}geometry.rule=isopo-npg", f"+{ACTOR}geometry.damping=0")
    actor = omega_conf_to_dataclass(composed(*SIZES, *ISOPO, *OPO, *keys))
    assert isinstance(actor, IsopoActorConfig)
    assert isinstance(actor.engine, IsopoEngineConfig)
    assert actor.engine.strategy == "isopo"
    assert actor.engine.geometry == {"rule": "isopo-npg", "damping": 0}
    assert actor.engine.seed == FSDPEngineConfig().seed


def test_the_documented_budget() -> None:
    """The lines of docs/verl.md, as a shell reads them."""
    page = (Path(__file__).parents[2] / "docs" / "verl.md").read_text()
    block = page.split("## A KL budget")[1].split("```")[1].removeprefix("text")
    actor = omega_conf_to_dataclass(composed(*SIZES, *shlex.split(block.replace("\\\n", " "))))
    assert isinstance(actor, BudgetActorConfig)
    assert isinstance(actor.engine, BudgetEngineConfig)
    assert actor.engine.strategy == "kl_budget"
    assert actor.engine.budget is not None
    assert actor.engine.budget.kl_budget == 0.03


RECIPES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "as it is": ("gsm8k-isopo", [("task.chat_template_kwargs", "{enable_thinking: false}")]),
    "most keys": (
        "arithmetic-isopo",
        [
            ("objective.loss_agg_mode", "seq-mean-token-sum-norm"),
            ("regularizer.kl_coef", "0.1"),
            ("regularizer.kl_estimator", "k2"),
            ("model.lora.rank", "8"),
            ("rollout.engine", "vllm"),
            ("rollout.importance_cap", "2"),
            ("rollout.overlong_buffer", "2"),
            ("update.microbatch_tokens", "4096"),
            ("update.kl_budget", "0.03"),
            ("update.kl_control", "corrected"),
            ("optimizer.eps", "1e-6"),
            ("logging.tracker", "wandb"),
        ],
    ),
    "a budget": (
        "arithmetic",
        [
            ("algorithm", "grpo"),
            ("update.kl_budget", "0.03"),
            ("update.kl_budget_per", "token"),
            ("update.kl_num_sequences", "8"),
            ("update.num_minibatches", "2"),
        ],
    ),
    "to the sampler": (
        "arithmetic",
        [
            ("algorithm", "dppo-tv"),
            ("regularizer.kl_coef", "0.1"),
            ("regularizer.kl_in", "reward"),
            ("regularizer.kl_estimator", "k1"),
            ("optimizer.name", "sgd"),
            ("optimizer.momentum", "0.9"),
        ],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_verl_has_every_key_of_a_recipe_s_command(name: str) -> None:
    """Hydra refuses a key that verl does not have, and our classes a value that does not fit."""
    recipe, changes = RECIPES[name]
    data = Prepared("model", Path("t"), Path("v"), ("exact_match",), (1.0,), "{{ messages }}")
    words = overrides(load_recipe(recipe, changes), data, gpus(8))
    assert omega_conf_to_dataclass(composed(*words)).ppo_micro_batch_size_per_gpu > 0


def test_verl_has_every_key_of_the_example() -> None:
    text = (Path(__file__).parents[2] / "examples" / "verl_command.sh").read_text()
    words = shlex.split(text.split("verl.trainer.main_ppo")[-1].replace("\\\n", " "))
    actor = omega_conf_to_dataclass(composed(*(re.sub(r"\$.*", "x", word) for word in words[:-1])))
    assert isinstance(actor, IsopoActorConfig)
    assert actor.policy_loss.loss_mode == "gpg"


def test_hydra_passes_the_message_on() -> None:
    with pytest.raises(hydra.errors.InstantiationException, match="loss_mode is 'vanilla'; ISOPO"):
        omega_conf_to_dataclass(composed(*SIZES, *ISOPO))
