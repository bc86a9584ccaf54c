"""GRPOTrainer with one of our sequence-level objectives in the place of its losses.

What TRL's own loss computes beside the policy term (KL, entropy bonus, metrics) is taken from it:
it is called with advantages of zero, under which every policy term of TRL's vanishes, value and
gradient.

Legend for shape suffixes: B sequences, T completion tokens, W sequences of all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from proxstep.algorithms import LOSSES
from proxstep.algorithms.preparation import Anchor, opo_signal, vocabulary_size
from proxstep.engines.trl.configs import OpoConfig
from proxstep.engines.trl.release import SCORING_INPUTS
from proxstep.errors import ProxstepError
from proxstep.typing import Tensor

SIGNAL, MU, GROUP, KEY = "proxstep_signal", "proxstep_mu", "proxstep_group", "proxstep_key"
NUM_SEQUENCES = "proxstep_num_sequences"
"""What a batch carries beside TRL's own tensors; TRL shuffles and splits it with them."""

_REGULARIZER_LOSS = "dapo"
"""TRL's default loss: a term with coefficient beta is a mean over the step's tokens."""

_OF_POLICY_TERM = ("policy_loss", "clip_ratio/")
"""TRL's metrics of the term that vanishes."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A microbatch as the objective sees it, with TRL's part of its loss.

    Attributes:
        log_prob_BT: The policy's log-probabilities in nats, with their graph.
        old_log_prob_BT: The anchor's.
        response_BT: True at the tokens that count.
        other_loss: KL and entropy terms, scaled for accumulation; with their graph.
    """

    log_prob_BT: Tensor
    old_log_prob_BT: Tensor
    response_BT: Tensor
    other_loss: Tensor


class SequenceTrainer(GRPOTrainer):
    """What `OpoTrainer` and `IsopoTrainer` share."""

    config_class: type[OpoConfig] = OpoConfig
    model: Any
    args: Any
    accelerator: Any
    num_generations: Any
    num_generations_eval: Any
    _metrics: Any

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **options: Any
    ) -> None:
        ours = self.config_class
        if args is None:
            name = model if isinstance(model, str) else str(model.config._name_or_path)
            args = ours(f"{name.rstrip('/').split('/')[-1] or 'model'}-{self._name}")
        if type(args) is not ours:
            raise ProxstepError(
                f"args is a {type(args).__name__}: give {type(self).__name__} a {ours.__name__}, "
                "which takes the same options"
            )
        super().__init__(model, reward_funcs, args, *more, **options)
        self.loss_type = _REGULARIZER_LOSS
        self.objective = LOSSES[args.loss_type]
        self._aggregation = args.aggregation()
        self._section = args.opo_section() if args.loss_type == "opo" else None
        self._last_scores: tuple[Tensor, ...] | None = None

    # -- once for a rollout ------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Add what the objective makes of whole groups, before TRL shuffles them."""
        output = super()._generate_and_score_completions(inputs)
        advantage_B = output["advantages"]
        if advantage_B.dim() != 1:
            raise ProxstepError("advantages per token leave a sequence without one coefficient")
        count, rank = len(advantage_B), self.accelerator.process_index
        own = slice(rank * count, (rank + 1) * count)
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        advantage_W = self.accelerator.gather(advantage_B)
        key_W = torch.arange(len(advantage_W), device=advantage_B.device)
        group_W = key_W // size
        response_BT = _response(output)
        counted = response_BT.any(dim=1).sum()
        output |= {
            SIGNAL: advantage_B,
            GROUP: group_W[own],
            KEY: key_W[own],
            NUM_SEQUENCES: self.accelerator.gather(counted).sum(),
        }
        if self._section is not None:
            anchor = self._anchor(output, response_BT)
            signal = opo_signal(self._section, advantage_W.cpu(), group_W.cpu(), anchor, None)
            output[SIGNAL] = signal.value_B.to(advantage_B)[own]
            output[MU] = torch.tensor(float(signal.hyper["mu"]), device=advantage_B.device)
            for name, value in signal.metrics.items():
                self._metrics[mode][f"objective/{name}"].append(value)
        return output

    def _anchor(self, output: Mapping[str, Any], response_BT: Tensor) -> Anchor | None:
        """Return the policy that sampled, as all ranks' completions see it, where it is needed."""
        section = self._section
        assert section is not None
        if section.anchor_correction == "absorbed" and not section.adaptive_tau:
            return None
        log_prob_BT = output.get("old_per_token_logps")
        if log_prob_BT is None:
            log_prob_BT = self._score_again(output)
        gathered = [
            self.accelerator.gather(self.accelerator.pad_across_processes(value_BT, dim=1)).cpu()
            for value_BT in (log_prob_BT, response_BT.long())
        ]
        vocabulary = vocabulary_size(self.accelerator.unwrap_model(self.model))
        return Anchor(gathered[0], gathered[1].bool(), vocabulary)

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

    # -- for each microbatch -----------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Remember what TRL's loss computed, whichever inputs its release passes on."""
        self._last_scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._last_scores

    def _score(self, model: Any, inputs: Mapping[str, Any]) -> Scored:
        """Run TRL's loss without advantages, and take its log-probabilities."""
        without = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
        if self.beta == 0:  # then only a policy term would take the ratio, which can overflow
            without.pop("old_per_token_logps", None)
        other_loss = super()._compute_loss(model, without)
        measured = self._metrics["train" if self.model.training else "eval"]
        for name in [key for key in measured if key.startswith(_OF_POLICY_TERM)]:
            del measured[name]
        assert self._last_scores is not None
        log_prob_BT, self._last_scores = self._last_scores[0], None
        old_log_prob_BT = inputs.get("old_per_token_logps")
        if old_log_prob_BT is None:
            old_log_prob_BT = log_prob_BT.detach()
        return Scored(log_prob_BT, old_log_prob_BT, _response(inputs), other_loss)

    def _plain_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the objective with TRL's other terms, for an ordinary backward or none."""
        scored = self._score(model, inputs)
        tensors, hyper = self._objective_arguments(scored, inputs)
        loss, metrics = self.objective.loss(*tensors, **hyper)
        self._note(metrics)
        return loss * self._share(inputs) + scored.other_loss

    def _objective_arguments(
        self, scored: Scored, inputs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return the objective's arguments; its counts are 1, for `_share` to divide."""
        weight_B = inputs.get("importance_sampling_ratio")
        weight_B = None if weight_B is None else weight_B.squeeze(1)
        hyper: dict[str, Any] = {
            name: getattr(self.args, name, None) for name in self.objective.hyper_parameters
        }
        if self.args.loss_type == "gspo":
            hyper = {"clip_ratio_low": self.epsilon_low, "clip_ratio_high": self.epsilon_high}
        if MU in inputs:
            hyper["mu"] = float(inputs[MU])
        hyper["aggregation"] = dataclasses.replace(self._aggregation, sequence_weights=weight_B)
        tensors = scored.log_prob_BT, scored.old_log_prob_BT, inputs[SIGNAL], scored.response_BT
        return tensors, hyper

    def _share(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the objective's factor: one over the optimizer step's sequences, or its tokens.

        Gradients are averaged over ranks, so it is the ranks' mean count. TRL counts over a
        generation batch, of which a step takes a part.
        """
        by_token = self._aggregation.mode == "token-mean"
        count = inputs["num_items_in_batch" if by_token else NUM_SEQUENCES].float().clamp(min=1)
        count = count / self.accelerator.num_processes
        if self.model.training:
            steps = self.current_gradient_accumulation_steps / self.args.steps_per_generation
            count = count * steps
        return 1 / count

    def _note(self, metrics: dict[str, Tensor]) -> None:
        """Log an objective's metrics, averaged over sequences and ranks."""
        mode = "train" if self.model.training else "eval"
        for name, value_B in metrics.items():
            mean = self.accelerator.gather(value_B.detach().float()).mean().item()
            self._metrics[mode][f"objective/{name}"].append(mean)


def _response(batch: Mapping[str, Any]) -> Tensor:
    """Return where the batch's completion tokens count, as booleans."""
    mask_BT = batch["completion_mask"]
    tool_mask_BT = batch.get("tool_mask")
    return (mask_BT if tool_mask_BT is None else mask_BT * tool_mask_BT).bool()
