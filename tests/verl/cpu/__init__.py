"""A CPU platform and a CPU rollout for verl: a plugin for tests and for learning.

With it `verl.trainer.main_ppo` runs whole on a machine without an accelerator: Ray, several
data-parallel ranks, FSDP2 over gloo, generation, weight sync, checkpoints. It is not for training
in earnest: generation is plain transformers `generate`, and every rank shares the machine's cores.

Importing the module is using it. Every process of a run must do so before verl asks for its
platform, which the environment variable `VERL_USE_EXTERNAL_MODULES=tests.verl.cpu`
takes care of.
"""


def _load() -> None:
    from tests.verl.cpu import patches, platform

    patches.apply()
    platform.use()

    from tests.verl.cpu import rollout  # what it imports asks for the platform

    rollout.register()


_load()
