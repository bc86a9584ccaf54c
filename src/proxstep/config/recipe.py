"""The recipe: one YAML file that says what a run does, checked before any work starts.

Every key has a type, a default and a sentence; `proxstep train --help` prints them.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from proxstep.algorithms import ALGORITHMS, Algorithm
from proxstep.algorithms.advantages import NONNEGATIVE, compares_completions
from proxstep.config.geometry import GeometrySection
from proxstep.config.names import rule_and_objective
from proxstep.config.objectives import ObjectiveSection, section_of
from proxstep.config.optimizer import OptimizerSection
from proxstep.config.regularizer import RegularizerSection
from proxstep.config.sections import (
    EMBEDDED_MODELS,
    EMBEDDED_TASKS,
    EvaluationSection,
    LoggingSection,
    ModelSection,
    Positive,
    RolloutSection,
    Section,
    TaskSection,
    UpdateSection,
)
from proxstep.config.unread import unread_key
from proxstep.isopo import PRESETS


def algorithm_names() -> list[str]:
    """Return what `algorithm` may be; RULE+OBJECTIVE, as in isopo+opo, composes any other pair."""
    return [*ALGORITHMS, *(rule for rule in PRESETS if rule != "reinforce")]


def meaning_of(algorithm: str) -> dict[str, dict[str, Any]] | None:
    """Return what an algorithm's name stands for, or None if it is unknown.

    >>> meaning_of("isopo-natural+opo")
    {'objective': {'name': 'opo'}, 'geometry': {'rule': 'isopo-natural'}}
    """
    found = rule_and_objective(algorithm, PRESETS, ALGORITHMS)
    if found is None:
        return None
    rule, objective = found
    return {"objective": {"name": objective}, "geometry": {"rule": rule}}


def undefined_composition(rule: str, objective: str) -> str | None:
    """Return why a rule cannot transform an objective's gradient, or None if it can."""
    if rule == "none" or ALGORITHMS[objective].level == "sequence":
        return None
    able = ", ".join(name for name, found in ALGORITHMS.items() if found.level == "sequence")
    return (
        f"geometry.rule {rule} with objective {objective}: a token-level objective has no "
        f"coefficient per sequence to transform; use one of {able}, or geometry.rule none"
    )


class Recipe(Section):
    """A whole recipe."""

    algorithm: str = Field(
        description="An objective, a preset of ISOPO on REINFORCE, or RULE+OBJECTIVE (isopo+opo)."
    )
    label: str | None = Field(
        default=None,
        min_length=1,
        description="What tables and figures call the run, where several settings share an "
        "algorithm; null for the algorithm's name.",
    )
    external_lib: str | None = Field(
        default=None,
        description="A Python file, or a module's name, that registers algorithms of your own: it "
        "is imported before the recipe is read. See docs/howto/objective.md.",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of all random numbers.")
    steps: Positive = Field(default=100, description="Rollout steps.")
    device: str = Field(
        default="auto",
        description="auto: cuda if it is there, else cpu. Or cpu, cuda, cuda:1, mps.",
    )
    output_dir: str = Field(default="runs/latest", description="The run folder.")
    guard: Literal["off", "warn", "halve", "stop"] = Field(
        default="warn",
        description="What to do when the metrics show a collapse. warn: print a line. stop: end "
        "the run and keep the last good checkpoint. halve: go back to it with half the learning "
        "rate, three times at most. See docs/diagnostics.md.",
    )
    model: ModelSection = Field(default_factory=ModelSection)
    task: TaskSection = Field(default_factory=TaskSection)
    objective: ObjectiveSection
    geometry: GeometrySection = Field(default_factory=GeometrySection)
    regularizer: RegularizerSection = Field(default_factory=RegularizerSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    update: UpdateSection = Field(default_factory=UpdateSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @cached_property
    def keeps_initial(self) -> bool:
        """Whether a copy of the initial weights is needed; adapters can be switched off instead."""
        wanted = self.evaluation.kl_policy_initial or self.regularizer.kl_coef > 0
        return wanted and self.model.lora is None

    @cached_property
    def keeps_sampler(self) -> bool:
        """Whether the log-probabilities with which tokens are drawn are needed."""
        rollout = self.rollout
        corrects = rollout.importance_cap is not None or rollout.engine == "vllm"
        return corrects or self.objective.algorithm.ratio_to_sampler

    @cached_property
    def leaves_out_idle(self) -> bool:
        """Whether sequences whose signal is exactly 0 have no part in the update.

        ISOPO's Fisher sample and trailing means are of all sequences, and so are the terms of a
        regularizer in the loss.
        """
        idle = self.objective.algorithm.idle_at_zero and not self.regularizer.in_loss
        return idle and self.geometry.rule == "none"

    @model_validator(mode="after")
    def _check_sampling(self) -> Recipe:
        rollout, update = self.rollout, self.update
        compares = compares_completions(self.objective.advantage)
        remedy = self.objective.algorithm.compares(self.objective.options())
        if rollout.num_generations == 1 and (compares or remedy):
            what = self.objective.name
            if compares:
                what = f"objective.advantage {self.objective.advantage}"
                remedy = "batch-normalized advantages"
            raise ValueError(
                f"rollout.num_generations is 1, but {what} compares the completions of a prompt: "
                f"use at least 2, or {remedy}"
            )
        if rollout.num_generations * rollout.num_prompts == 1:
            raise ValueError("one completion per step has nothing to be compared with: sample more")
        if rollout.num_prompts % update.num_minibatches:
            raise ValueError(
                f"update.num_minibatches {update.num_minibatches} does not divide "
                f"rollout.num_prompts {rollout.num_prompts}: a prompt's group stays in one "
                "minibatch"
            )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Recipe:
        if self.rollout.engine == "transformers":
            return self
        if self.device not in ("auto", "cuda", "cuda:0"):
            raise ValueError(
                f"rollout.engine vllm samples on the first GPU, and device is {self.device}: use "
                "cuda, and choose the GPU with CUDA_VISIBLE_DEVICES; or rollout.engine transformers"
            )
        if not 0.01 <= self.rollout.temperature <= 2:
            raise ValueError(
                f"rollout.temperature {self.rollout.temperature} is outside 0.01 to 2, the range "
                "that rollout.engine vllm takes as it is: use transformers"
            )
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Recipe:
        algorithm = self.objective.algorithm
        for check in algorithm.checks:
            check(self.objective.options())
        if algorithm.ratio_to_sampler and self.rollout.importance_cap is not None:
            raise ValueError(
                f"rollout.importance_cap corrects for the sampler, which the ratios of "
                f"{algorithm.name} do already: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> Recipe:
        rollout, longest = self.rollout, self.rollout.max_completion_length
        if rollout.overlong_buffer is not None and rollout.overlong_buffer > longest:
            raise ValueError(
                f"rollout.overlong_buffer {rollout.overlong_buffer} is longer than a completion "
                f"can be (rollout.max_completion_length {longest}): lower it"
            )
        punished = rollout.overlong_buffer is not None or self.regularizer.in_reward
        if punished and self.objective.advantage in NONNEGATIVE:
            raise ValueError(
                f"objective.advantage {self.objective.advantage} takes no reward below 0, which "
                "rollout.overlong_buffer and regularizer.kl_in reward give: leave them out, or use "
                "another advantage"
            )
        if rollout.dynamic_sampling_max_batches is not None and rollout.num_generations == 1:
            raise ValueError(
                "rollout.dynamic_sampling_max_batches looks for completions of a prompt with "
                "different rewards, but rollout.num_generations is 1: use at least 2"
            )
        if self.regularizer.kl_in == "reward" and self.regularizer.kl_estimator == "exact":
            raise ValueError(
                "regularizer.kl_in reward needs a regularizer.kl_estimator that depends on the "
                "sampled token, or its last token's choice would cost nothing: use k1"
            )
        return self

    @model_validator(mode="after")
    def _check_geometry(self) -> Recipe:
        if self.geometry.rule != "none":
            undefined = undefined_composition(self.geometry.rule, self.objective.name)
            if undefined:
                raise ValueError(undefined)
            self.geometry.to_rule()
        geometry = self.geometry
        if geometry.overlap_source == "previous_step" and geometry.num_overlap_positions is None:
            raise ValueError(
                "geometry.num_overlap_positions null keeps all positions of every layer from step "
                "to step, which geometry.overlap_source previous_step cannot: give a number"
            )
        if geometry.overlap_source not in (None, "microbatch") and geometry.fisher == "sequences":
            raise ValueError(
                f"geometry.overlap_source {geometry.overlap_source} chooses positions, and "
                "geometry.fisher sequences uses none: leave one of them out"
            )
        if geometry.rule == "proma-intra" and geometry.diagnose_every is not None:
            raise ValueError(
                "geometry.diagnose_every describes a weight for each sequence, which the gradient "
                "of geometry.rule proma-intra does not have: leave it out"
            )
        size, generations = self.update.microbatch_size, self.rollout.num_generations
        if self.geometry.interact == "group" and size is not None and size < generations:
            raise ValueError(
                f"geometry.interact group needs a prompt's completions in one microbatch: "
                f"update.microbatch_size {size} is below rollout.num_generations {generations}"
            )
        return self

    @model_validator(mode="after")
    def _check_microbatches(self) -> Recipe:
        if self.update.microbatch_tokens is None:
            return self
        if self.update.microbatch_size is not None:
            raise ValueError(
                "update.microbatch_tokens and update.microbatch_size both say how large a "
                "microbatch is: leave one of them out"
            )
        if self.geometry.depends_on_microbatches:
            raise ValueError(
                f"update.microbatch_tokens puts sequences of like length together, and "
                f"geometry.rule {self.geometry.rule} with these keys depends on which ones share a "
                "microbatch: use update.microbatch_size"
            )
        return self

    @model_validator(mode="after")
    def _check_head(self) -> Recipe:
        if self.model.head == "full":
            return self
        if self.geometry.needs_full_head:
            raise ValueError(
                "model.head chunked has no kernel and never all gradients of the logits, which "
                "geometry.rule isopo-natural, proma and proma-intra, and geometry.fisher sequences "
                "need: use model.head full"
            )
        if self.regularizer.needs_logits:
            raise ValueError(
                "regularizer needs all logits for the entropy and an exact KL divergence: use "
                "model.head full, or leave regularizer.entropy_coef at 0 and take "
                "regularizer.kl_estimator k2"
            )
        return self

    @model_validator(mode="after")
    def _check_task(self) -> Recipe:
        if self.task.name == "table" and self.task.train is None:
            raise ValueError("task.train is needed: a JSONL or Parquet file, or a hub data set")
        if self.task.name not in EMBEDDED_TASKS and self.model.name in EMBEDDED_MODELS:
            raise ValueError(
                f"model.name {self.model.name} knows only the characters of the tasks "
                f"{', '.join(EMBEDDED_TASKS)}, not {self.task.name}'s: name a model of the "
                "hub or a local folder"
            )
        weights, rewards = self.task.reward_weights, self.task.rewards
        if weights is not None and (rewards is None or len(weights) != len(rewards)):
            raise ValueError("task.reward_weights needs task.rewards, with one weight for each")
        return self

    @model_validator(mode="after")
    def _check_numerics(self) -> Recipe:
        self.optimizer.options()
        if self.model.dtype == "bfloat16":
            if self.update.kl_budget is not None:
                raise ValueError(
                    "update.kl_budget measures small differences of log-probabilities, and "
                    "model.dtype bfloat16 is too coarse for them: use float32, with "
                    "model.autocast bfloat16"
                )
            if self.model.autocast is not None:
                raise ValueError(
                    "model.autocast computes with float32 weights in bfloat16, but model.dtype is "
                    "bfloat16 already: leave one of them out"
                )
            if self.optimizer.name in ("soap", "kron") and self.model.lora is None:
                raise ValueError(
                    f"optimizer.name {self.optimizer.name} keeps its preconditioner in the dtype "
                    "of the weights, and model.dtype bfloat16 is too coarse for one: use float32, "
                    "with model.autocast bfloat16"
                )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Recipe:
        optimizer, total = self.optimizer, self.steps * self.update.num_updates
        if optimizer.lr_scheduler_type != "constant" and optimizer.warmup_updates >= total:
            raise ValueError(
                f"optimizer.warmup_updates {optimizer.warmup_updates} is all of the run's {total} "
                f"optimizer steps: nothing is left for optimizer.lr_scheduler_type "
                f"{optimizer.lr_scheduler_type}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _check_unread(self) -> Recipe:
        if unread := unread_key(self):
            raise ValueError(unread)
        return self


@lru_cache
def recipe_of(algorithm: Algorithm) -> type[Recipe]:
    """Return the recipe whose objective's keys are that algorithm's."""
    return create_model("Recipe", __base__=Recipe, objective=(section_of(algorithm), ...))
