"""GRPOTrainer with one of our algorithms in the place of its losses.

What TRL's own loss computes beside the policy term (KL, entropy bonus, metrics) is taken from it:
it is called with advantages of zero, under which every policy term of TRL's vanishes, value and
gradient.

Shapes: B sequences, T completion tokens, W sequences of all ranks, F reward functions.
"""

from __future__ import annotations

import copy
from collections.abc import KeysView, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from trl.trainer.grpo_trainer import GRPOTrainer

from proxstep.algorithms import ADVANTAGES, Aggregation, OldPolicy, SignalInputs
from proxstep.algorithms.advantages import compares_completions
from proxstep.engines.trl.budget import StepBudget
from proxstep.engines.trl.configs import IsopoConfig, OpoConfig, PolicyConfig
from proxstep.engines.trl.release import SCORING_INPUTS
from proxstep.engines.trl.scoring import rebind_forwards, response_mask
from proxstep.errors import ProxstepError
from proxstep.training.batch import with_reward
from proxstep.training.rollout import vocabulary_size
from proxstep.typing import Tensor

SIGNAL, WEIGHT, HYPER = "proxstep_signal", "proxstep_weight", "proxstep_hyper_"
GROUP, KEY = "proxstep_group", "proxstep_key"
NUM_SEQUENCES = "proxstep_num_sequences"
"""What a batch carries beside TRL's own tensors; TRL shuffles and splits it with them."""

_COUNTS = {
    "token-mean": "num_items_in_batch",
    "seq-mean-token-sum": NUM_SEQUENCES,
    "seq-mean-token-mean": NUM_SEQUENCES,
    "seq-mean-token-sum-norm": NUM_SEQUENCES,
}
"""The batch's count by which an aggregation divides."""

_REGULARIZER_LOSS = "dapo"
"""TRL's default loss: a term with coefficient beta is a mean over the step's tokens."""

_OF_POLICY_TERM = ("policy_loss", "clip_ratio/")
"""TRL's metrics of the term that vanishes; the first one is then logged for ours."""


@dataclass(frozen=True)
class Scored:
    """A microbatch as the algorithm's loss sees it, with TRL's part of the loss.

    Attributes:
        log_prob_BT: The policy's log-probabilities in nats, with their graph.
        old_log_prob_BT: The old policy's, or the sampler's where the algorithm's ratios are to it.
        response_BT: True at the tokens that count.
        other_loss: KL and entropy terms, scaled for accumulation; with their graph.
    """

    log_prob_BT: Tensor
    old_log_prob_BT: Tensor
    response_BT: Tensor
    other_loss: Tensor


class PolicyTrainer(GRPOTrainer):
    """GRPOTrainer with any of our algorithms; same arguments, with a `PolicyConfig`.

    `PolicyConfig.loss_type` names the algorithm. Its advantages, its preparation and its loss are
    those of the local engine.
    """

    config_class: type[PolicyConfig] = PolicyConfig
    _tag_names = ["trl", "proxstep"]  # noqa: RUF012 (as TRL's own)
    _name = "proxstep"
    _paper: dict[str, str] = {}  # noqa: RUF012
    model: Any
    args: Any
    accelerator: Any
    reward_weights: Any
    num_generations: Any
    num_generations_eval: Any
    _metrics: Any
    _logs: Any

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **options: Any
    ) -> None:
        ours = self.config_class
        if args is None:
            name = model if isinstance(model, str) else str(model.config._name_or_path)
            args = ours(f"{name.rstrip('/').split('/')[-1] or 'model'}-{self._name}")
        if not isinstance(args, ours):
            raise ProxstepError(
                f"args is of type {type(args).__name__}: give {type(self).__name__} its own, "
                f"{ours.__name__}, which takes the same options"
            )
        if isinstance(args, IsopoConfig) and not issubclass(ours, IsopoConfig):
            raise ProxstepError(
                f"args is of type {type(args).__name__}, and {type(self).__name__} would leave its "
                f"geometry out: use IsopoTrainer, or give it {ours.__name__}"
            )
        args.check()
        args.taken = True
        set_seed(args.seed)  # TRL 1.14 draws adapters before it does so
        super().__init__(model, reward_funcs, args, *more, **options)
        self.loss_type = _REGULARIZER_LOSS
        section = args.objective()
        self.algorithm, self._options = section.algorithm, section.options()
        self._advantage, self._mode = args.own_advantage(), section.loss_agg_mode
        self._rewards_WF: Tensor | None = None
        self._last_scores: tuple[Tensor, ...] | None = None
        self._budget: StepBudget | None = None
        if args.kl_budget is not None:
            self._budget = StepBudget(args, self._judge, self._log_step)
        self.add_callback(_EndOfStep(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the trainer with its model, whose samples are then the copy's own."""
        copied = memo[id(self)] = object.__new__(type(self))
        held = vars(self).items()  # in TRL 1.14 a view among them, which cannot be copied
        held = {name: tuple(v) if isinstance(v, KeysView) else v for name, v in held}
        vars(copied).update(copy.deepcopy(held, memo))
        models: list[Any] = [self.model, self.ref_model]
        for model in filter(None, models):
            rebind_forwards(model, memo)
        return copied

    # -- once for a rollout ------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the rewards of all ranks for the advantages."""
        rewards_WF = self._rewards_WF = super()._calculate_rewards(*args, **kwargs)
        return rewards_WF

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Add what the algorithm makes of whole groups, before TRL shuffles them."""
        output = super()._generate_and_score_completions(inputs)
        if self._budget is not None and self.model.training:
            self._budget.begin_rollout()
        advantage_B = output["advantages"]
        if advantage_B.dim() != 1:
            raise ProxstepError("advantages per token leave a sequence without its one advantage")
        count, rank = len(advantage_B), self.accelerator.process_index
        own = slice(rank * count, (rank + 1) * count)
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        advantage_W = self.accelerator.gather(advantage_B)
        key_W = torch.arange(len(advantage_W), device=advantage_B.device)
        group_W = key_W // size
        if self._advantage is not None:
            advantage_W = self._advantages(self._advantage, group_W, size).to(advantage_W)
        response_BT = response_mask(output)
        weight_W = output.get("importance_sampling_ratio")
        if weight_W is not None:
            weight_W = self.accelerator.gather(weight_W.squeeze(1)).cpu()
        old_policy = None
        if self.algorithm.reads_old_policy(self._options):
            old_policy = self._old_policy(output, response_BT)
        rollout = SignalInputs(advantage_W.cpu(), group_W.cpu(), old_policy, weight_W)
        signal = self.algorithm.signal(rollout, self._options)
        counted = response_BT.any(dim=1).sum()
        output |= {
            "advantages": advantage_W[own],
            SIGNAL: signal.value_B.to(advantage_B)[own],
            GROUP: group_W[own],
            KEY: key_W[own],
            NUM_SEQUENCES: self.accelerator.gather(counted).sum(),
        }
        if signal.importance_B is not None:
            output[WEIGHT] = signal.importance_B.to(advantage_B)[own]
        for name, value in signal.hyper.items():
            output[HYPER + name] = torch.tensor(float(value), device=advantage_B.device)
        for name, value in signal.metrics.items():
            self._metrics[mode][f"objective/{name}"].append(value)
        return output

    def _advantages(self, kind: str, group_W: Tensor, size: int) -> Tensor:
        """Return the advantages of all ranks' completions, in groups of a size.

        Those that the local engine leaves out have 0: without a finite reward, or alone in a group.
        """
        assert self._rewards_WF is not None
        reward_W = (self._rewards_WF * self.reward_weights.to(self._rewards_WF)).nansum(dim=1)
        advantage_W = torch.zeros_like(reward_W)
        reward_W = reward_W.masked_fill(self._rewards_WF.isnan().all(dim=1), torch.nan).cpu()
        minimum = 2 if compares_completions(kind) else min(2, size)
        kept = with_reward(reward_W, group_W.cpu(), minimum)
        if len(kept) > 1:
            value, _ = ADVANTAGES[kind](reward_W[kept], group_W.cpu()[kept])
            advantage_W[kept.to(advantage_W.device)] = value.to(advantage_W)
        logged = self._logs["advantages"]  # TRL's own, of this rollout
        for _ in range(min(len(logged), len(advantage_W))):
            logged.pop()
        logged.extend(advantage_W.tolist())
        return advantage_W

    def _old_policy(self, output: Mapping[str, Any], response_BT: Tensor) -> OldPolicy:
        """Return the policy before the first update, as all ranks' completions see it."""
        log_prob_BT = output.get("old_per_token_logps")
        if log_prob_BT is None:
            log_prob_BT = self._score_again(output)
        gathered = [
            self.accelerator.gather(self.accelerator.pad_across_processes(value_BT, dim=1)).cpu()
            for value_BT in (log_prob_BT, response_BT.long())
        ]
        vocabulary = vocabulary_size(self.accelerator.unwrap_model(self.model))
        return OldPolicy(gathered[0], gathered[1].bool(), vocabulary)

    def _judge(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities that a KL budget compares, in float32, and which count."""
        return self._score_again(inputs), response_mask(inputs)

    def _score_again(self, output: Mapping[str, Any]) -> Tensor:
        """Return the policy's log-probabilities of the completions, without gradient."""
        images = {name: output[name] for name in SCORING_INPUTS if name in output}
        ids_BT = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask_BT = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        width = output["completion_ids"].shape[1]
        size = self.args.per_device_train_batch_size
        with torch.no_grad():
            scores = super()._get_per_token_logps_and_entropies(
                self.model, ids_BT, mask_BT, width, batch_size=size, **images
            )
        return scores[0]

    # -- for each optimizer step -------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Put the budget around the optimizer, once."""
        super().create_optimizer(*args, **kwargs)
        if self._budget is not None and self._budget.optimizer is None:
            self.optimizer = self._budget.around(self.optimizer, self.model)
        return self.optimizer

    def end_step(self) -> None:
        """Do what is to be done after the optimizer's step."""
        if self._budget is not None:
            self._budget.end_step()

    def _log_step(self, measured: Mapping[str, float]) -> None:
        for name, value in measured.items():
            self._metrics["train"][name].append(value)

    # -- for each microbatch -----------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Remember what the step is made of."""
        inputs = super()._prepare_inputs(generation_batch)
        if self._budget is not None and self.model.training:
            self._budget.remember(inputs)
        return inputs

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        """Return the algorithm's loss with TRL's other terms."""
        scored = self._score(model, inputs)
        tensors, options = self._loss_arguments(scored, inputs)
        loss, metrics = self.algorithm.loss(*tensors, **options)
        loss = loss * self._share(inputs)
        self._note(loss, metrics)
        return loss + scored.other_loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Remember what TRL's loss computed, whichever inputs its release passes on."""
        self._last_scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._last_scores

    def _score(self, model: Any, inputs: Mapping[str, Any]) -> Scored:
        """Run TRL's loss without advantages, and take its log-probabilities."""
        without = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
        if self.beta == 0:  # then only a policy term would take the ratio, which can overflow
            without.pop("old_per_token_logps", None)
        measured = self._metrics["train" if self.model.training else "eval"]
        ours = {name: list(measured[name]) for name in measured if name.startswith(_OF_POLICY_TERM)}
        other_loss = super()._compute_loss(model, without)
        for name in [key for key in measured if key.startswith(_OF_POLICY_TERM)]:
            del measured[name]
        measured.update(ours)
        assert self._last_scores is not None
        log_prob_BT, self._last_scores = self._last_scores[0], None
        old_log_prob_BT = inputs.get("old_per_token_logps")
        if old_log_prob_BT is None:  # the first update of a rollout: TRL does not score it twice
            old_log_prob_BT = log_prob_BT.detach()
        if self.algorithm.ratio_to_sampler and "sampling_per_token_logps" in inputs:
            sampler_BT = inputs["sampling_per_token_logps"]  # NaN where vLLM has none
            old_log_prob_BT = torch.where(sampler_BT.isnan(), old_log_prob_BT, sampler_BT)
        return Scored(log_prob_BT, old_log_prob_BT, response_mask(inputs), other_loss)

    def _loss_arguments(
        self, scored: Scored, inputs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return the loss's arguments; its counts are 1, for `_share` to divide."""
        aggregation = Aggregation(
            self._mode,
            num_sequences=1,
            num_tokens=1,
            max_length=self.args.max_completion_length,
            sequence_weights=inputs.get(WEIGHT),
        )
        of_rollout = {
            name.removeprefix(HYPER): float(inputs[name])
            for name in inputs
            if name.startswith(HYPER)
        }
        own = self.algorithm.loss_options(self._options)
        tensors = scored.log_prob_BT, scored.old_log_prob_BT, inputs[SIGNAL], scored.response_BT
        return tensors, {**own, **of_rollout, "aggregation": aggregation}

    def _share(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the loss's factor: one over the optimizer step's sequences, or its tokens.

        Gradients are averaged over ranks, so it is the ranks' mean count. TRL counts over a
        generation batch, of which a step takes a part.
        """
        count = inputs[_COUNTS[self._mode]].float().clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            steps = self.current_gradient_accumulation_steps / self.args.steps_per_generation
            count = count * steps
        return 1 / count

    def _note(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Log the algorithm's part of a loss and its metrics, averaged over sequences and ranks.

        A step's losses add up to its own, and TRL averages what its microbatches log.
        """
        mode, count = "eval", 1
        if self.model.training:
            mode, count = "train", self.current_gradient_accumulation_steps
        measured = {f"objective/{name}": value_B for name, value_B in metrics.items()}
        for name, value_B in {"policy_loss": loss * count, **measured}.items():
            mean = self.accelerator.gather(value_B.detach().float()).mean().item()
            self._metrics[mode][name].append(mean)


class _EndOfStep(TrainerCallback):
    """Tells the trainer that its optimizer has stepped."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """End the step."""
        self._trainer.end_step()


class OpoTrainer(PolicyTrainer):
    """PolicyTrainer whose algorithm is OPO; same arguments, with an `OpoConfig`.

    Source: arXiv 2601.12415.
    """

    config_class: type[PolicyConfig] = OpoConfig
    _tag_names = ["trl", "proxstep", "opo"]  # noqa: RUF012
    _name = "OPO"
    _paper = {"title": "Orthogonalized Policy Optimization", "id": "2601.12415"}  # noqa: RUF012
