"""The one schema of metrics.jsonl: what each field is and in which unit.

Every line has every field of `FIELDS`; what was not measured in that step is null. Fields whose
names depend on the run (one per reward function, objective, regularizer or geometry statistic)
begin with a prefix of `PREFIXES`.
"""

from __future__ import annotations

FIELDS: dict[str, str] = {
    "step": "Rollout steps done. Step 0 is the evaluation before any training.",
    "num_updates": "Optimizer steps done.",
    "num_sequences": "Completions sampled for training so far.",
    "elapsed_seconds": "Wall-clock seconds since the run began, without pauses between resumed "
    "parts.",
    "reward": "Mean reward of all of this step's sampled completions, in reward units, before "
    "anything is added for length or divergence.",
    "reward_std": "Mean over groups of the standard deviation of the rewards in the group.",
    "frac_reward_zero_std": "Share of groups whose rewards are all equal; they give no gradient.",
    "frac_invalid_reward": "Share of completions left out because no reward function gave a finite "
    "number.",
    "frac_informative_groups": "Share of the sampled groups whose rewards, before anything is "
    "added, are not all equal; dynamic sampling learns from these alone.",
    "generation_batches": "Batches of num_prompts prompts that the step sampled; above 1 only with "
    "dynamic sampling.",
    "frac_masked_completions": "Share of the completions with an advantage that are masked because "
    "they were truncated; null where rollout.mask_truncated_completions is off.",
    "frac_left_out_sequences": "Share of sequences left out of the update because their signal is "
    "exactly 0; entropy and objective/ are means over the others. Null where an objective, a "
    "geometry or a regularizer needs all sequences.",
    "skipped": "1 where nothing was left to learn from, so that parameters and optimizer did not "
    "change; else 0.",
    "advantage_range": "Largest minus smallest advantage of the step.",
    "score": "Greedy validation score: mean of the first reward function over the validation "
    "prompts.",
    "score_standard_error": "Standard error of score, from the spread over the validation prompts.",
    "score_mean_length": "Mean length of the greedy validation completions, in tokens.",
    "score_clipped_ratio": "Share of the greedy validation completions cut off at "
    "max_completion_length.",
    "score_top_answer_share": "Share of the greedy validation completions with the most frequent "
    "answer: a policy that narrows down to one answer gains reward without learning the task.",
    "score_no_answer_share": "Share of the greedy validation completions without an answer, such "
    "as a number.",
    "kl_initial_policy": "KL(initial || policy) in nats per token, estimated on a frozen probe "
    "set that the initial policy sampled once.",
    "kl_policy_initial": "KL(policy || initial) in nats per token, exact over the vocabulary at "
    "each position of fresh samples from the policy.",
    "entropy": "Policy entropy in nats per token, exact over the vocabulary at the sampled "
    "positions of the sequences in the update, which differ from algorithm to algorithm.",
    "evaluation_entropy": "Policy entropy at an evaluation, on the samples of kl_policy_initial, "
    "whose prompts are the same for every algorithm.",
    "loss": "Value of the objective, summed over the step's microbatches, averaged over its "
    "updates.",
    "grad_norm": "Norm of the gradient before clipping (after the geometry), averaged over the "
    "step's updates.",
    "grad_response_efficiency": "grad_norm / (advantage_range / 2): the gradient per unit of "
    "advantage signal.",
    "learning_rate": "Learning rate of the step's last update.",
    "completions_mean_length": "Mean length of the sampled completions, in tokens, end token "
    "included.",
    "completions_max_length": "Longest sampled completion, in tokens.",
    "completions_clipped_ratio": "Share of sampled completions cut off at max_completion_length.",
    "seconds_rollout": "Seconds spent sampling completions.",
    "seconds_reward": "Seconds spent in reward functions.",
    "seconds_log_probs": "Seconds spent on the old policy's log-probabilities, entropy and KL.",
    "seconds_update": "Seconds spent in forward, backward and optimizer.",
    "seconds_evaluation": "Seconds spent on greedy validation and the KL probe.",
    "seconds_step": "Seconds of the whole step.",
}

PREFIXES: dict[str, str] = {
    "rewards/": "Mean of one reward function over the step's completions (rewards/NAME), and of "
    "what else it measured (rewards/NAME/MEASURED). Also what is added to the reward: "
    "rewards/overlong for length and, over the completions that have an advantage, rewards/kl for "
    "divergence from the initial policy.",
    "score_avg@": "Mean of the first reward function over evaluation.num_samples sampled "
    "completions of each validation prompt.",
    "score_pass@": "Probability that at least one of k sampled completions has a first reward of "
    "1 or more, estimated without bias from all of them and averaged over the validation prompts.",
    "objective/": "What the objective reports. Per update, averaged over sequences and "
    "updates: clip_ratio, ratio, kl_old_policy, abs_delta, chi_square, ... Per rollout: "
    "effective_sample_size, mu, tau, importance_mean, ... Each algorithm's page lists its own.",
    "sampler/": "The old policy compared with the sampler at the sampled tokens, in nats, where "
    "both are known (rollout.engine vllm, rollout.importance_cap): log_ratio_max and "
    "log_ratio_p999, the largest absolute log-ratio and its 99.9 % quantile; kl, the old policy's "
    "divergence from the sampler per token (k3).",
    "regularizer/": "The regularizer's terms in nats per completion token, averaged over updates: "
    "entropy and kl (of the policy from the initial one) before their coefficients, and loss.",
    "kl_budget/": "With update.kl_budget, averaged over updates, in nats per sequence or token as "
    "update.kl_budget_per says: predicted (for the step as the optimizer proposed it), scale (the "
    "share of it that was taken), realized (for the step before, on this step's samples, or, where "
    "update.kl_control measures its own step, for this one), factor (which multiplies "
    "predictions), forwards (passes over the sequences that judge the step).",
    "geometry/": "What ISOPO reports, averaged over layers and updates: weight_spread, ... See "
    "docs/diagnostics.md.",
}


def unknown_fields(record: dict[str, object]) -> list[str]:
    """Return the record's keys that the schema does not know.

    >>> unknown_fields({"step": 1, "rewards/numeric_answer": 0.5, "speed": 3})
    ['speed']
    """
    return [key for key in record if key not in FIELDS and not key.startswith(tuple(PREFIXES))]
