"""What `proxstep COMMAND --help` shows below the options."""

from __future__ import annotations

OVERRIDES = """\
Any key of the recipe can follow as --key value, with dots for sections and YAML for values:
  --algorithm opo --objective.alpha 0.2 --optimizer.learning_rate 1e-5 --rollout.num_generations 16
`proxstep train --keys` lists all of them with their defaults.
"""
EXAMPLES = {
    "train": """\
examples:
  proxstep train recipes/arithmetic.yaml
  proxstep train recipes/arithmetic.yaml --algorithm isopo-natural --output_dir runs/natural
  proxstep train recipes/gsm8k-isopo.yaml --model.name ./my-model --dry-run
  proxstep train --resume runs/natural
  proxstep train recipes/arithmetic.yaml --engine trl
  proxstep train recipes/arithmetic.yaml --engine trl --print-command > train.py

The run folder holds recipe.yaml (every value resolved), metrics.jsonl, samples.jsonl and
checkpoints/, whose newest `transformers.AutoModelForCausalLM.from_pretrained` loads.
Ctrl-C stops after the current step and writes a checkpoint.
""",
    "eval": """\
examples:
  proxstep eval runs/arithmetic                      the newest checkpoint of a run
  proxstep eval recipes/gsm8k-isopo.yaml                   a recipe's model, before any training
  proxstep eval runs/arithmetic --task.difficulty 4  the same checkpoint on something harder
""",
    "compare": """\
examples:
  proxstep compare recipes/arithmetic.yaml --algorithms reinforce,grpo,isopo,opo --seeds 3
  proxstep compare recipes/arithmetic.yaml --algorithms isopo,isopo+opo --seeds 5 --steps 80

Every algorithm gets the same recipe, prompts and seeds. Settings of one algorithm alone, such as a
learning rate tuned for it, go under the recipe's key per_algorithm; the report says what differs.
""",
    "diagnose": """\
examples:
  proxstep train recipes/arithmetic.yaml --algorithm isopo --geometry.diagnose_every 10
  proxstep diagnose runs/arithmetic-isopo

docs/diagnostics.md says what the figures mean; diagnostics.jsonl holds them all.
""",
    "report": """\
examples:
  proxstep report outputs/demo                                a folder of runs
  proxstep report runs/a runs/b --output ab.html --figure ab.png
""",
    "toy": """\
examples:
  proxstep toy saturation --out outputs/saturation
  proxstep toy bandit --out outputs/bandit --seeds 5 --steps 64

docs/toy.md says what they show; both take seconds.
""",
}
