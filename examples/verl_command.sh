#!/bin/sh
# verl's command line with our actor: ISOPO on REINFORCE's coefficients. The five
# lines from loss_mode on are what differs from a run of verl's own.
#
#   MODEL=Qwen/Qwen3-0.6B TRAIN=gsm8k_train.parquet VALIDATION=gsm8k_test.parquet \
#     sh examples/verl_command.sh
#
# Anything more is handed to verl: sh examples/verl_command.sh trainer.n_gpus_per_node=1
set -e
python -m verl.trainer.main_ppo \
  data.train_files="${TRAIN:?a Parquet file of prompts}" \
  data.val_files="${VALIDATION:?another one}" \
  data.train_batch_size=128 \
  data.max_prompt_length=512 \
  data.max_response_length=512 \
  actor_rollout_ref.model.path="${MODEL:?a name of the hub, or a folder}" \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 \
  actor_rollout_ref.actor.optim.lr=2e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.actor.use_kl_loss=false \
  actor_rollout_ref.actor.policy_loss.loss_mode=gpg \
  actor_rollout_ref.model.external_lib=proxstep.engines.verl \
  actor_rollout_ref.actor.strategy=isopo \
  actor_rollout_ref.actor._target_=proxstep.engines.verl.IsopoActorConfig \
  +actor_rollout_ref.actor.geometry.rule=isopo \
  algorithm.adv_estimator=grpo \
  trainer.nnodes=1 \
  trainer.n_gpus_per_node=8 \
  trainer.total_epochs=1 \
  "$@"
