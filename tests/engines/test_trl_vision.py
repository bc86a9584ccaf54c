"""Vision-language models in TRL, with text alone and with images; the vision tower is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tests.engines.trl_case import PROMPTS, SIZES, Watch, dataset, quiet, text_reward, trained
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from proxstep.engines.trl import IsopoTrainer, OpoTrainer
from proxstep.errors import ProxstepError
from proxstep.training.demo_model import build_embedded_model

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
OPTIONS = SIZES | {"gradient_accumulation_steps": 2}


def llava(*, frozen: bool = True) -> tuple[Any, Any]:
    """A processor and a model: four patches of an image of 8 x 8, each of which is a token."""
    tokenizer, _ = build_embedded_model()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.image_token, tokenizer.image_token_id = "<image>", image
    tokenizer.chat_template = TEMPLATE
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes),
            vision_config=CLIPVisionConfig(
                num_hidden_layers=2, image_size=8, patch_size=4, projection_dim=16, **sizes
            ),
            image_token_index=image,
            vision_feature_layer=-1,
            image_seq_length=4,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for part in ("vision_tower", "multi_modal_projector"):
        model.get_submodule(f"model.{part}").requires_grad_(not frozen)
    return processor, model.float()


def pictures() -> Dataset:
    images = [Image.new("RGB", (8, 8), (30 * i, 200 - 20 * i, 30)) for i in range(8)]
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:8]]
    return Dataset.from_dict({"prompt": prompts, "image": images})


def chat_reward(completions: list[Any], **columns: Any) -> list[float]:
    return text_reward([done[0]["content"] for done in completions])


def run(folder: Path, trainer_class: Any, *, images: bool, **options: Any) -> Watch:
    processor, model = llava()
    options["generation_kwargs"] = {"suppress_tokens": [processor.tokenizer.image_token_id]}
    data, reward = (pictures(), chat_reward) if images else (dataset(), text_reward)
    with quiet():
        args = trainer_class.config_class(str(folder), **(OPTIONS | options))
        trainer = trainer_class(model, reward, args, data, processing_class=processor)
    watch = Watch(model=trainer.model)
    trainer.add_callback(watch)
    torch.manual_seed(0)
    trained(trainer)
    return watch


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (True, {}),
        (False, {}),
        pytest.param(True, {"rule": "isopo-natural"}, marks=pytest.mark.slow),
    ],
)
def test_the_language_model_of_a_vision_model_is_trained(
    tmp_path: Path, images: bool, options: dict[str, Any]
) -> None:
    """By ISOPO's rule, which for the identity is the gradient that another trainer gives."""
    watch = run(tmp_path, IsopoTrainer, images=images, **options)
    assert not [name for name in watch.gradients[0] if "vision" in name or "projector" in name]
    assert all(gradient.isfinite().all() for gradient in watch.gradients[0].values())
    assert any("lm_head" in name for name in watch.gradients[0])
    assert watch.logs[0]["grad_norm"] > 0
    if images and not options:
        plain = run(tmp_path, IsopoTrainer, images=True, loss_type="opo", rule="reinforce")
        expected = run(tmp_path, OpoTrainer, images=True)
        for name, gradient in expected.gradients[0].items():
            torch.testing.assert_close(plain.gradients[0][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other_parameters", ["transform", "reinforce", "freeze"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_trainable_vision_tower_is_refused(
    tmp_path: Path, other_parameters: str, adapters: bool
) -> None:
    """At construction, with the parts to freeze, however the rest is treated."""
    processor, model = llava(frozen=False)
    lora = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if adapters else {}
    with quiet():
        args = IsopoTrainer.config_class(
            str(tmp_path), **OPTIONS, other_parameters=other_parameters
        )
    named = r"freeze the vision tower .*vision_tower.*requires_grad_\(False\).*exclude_modules"
    with quiet(), pytest.raises(ProxstepError, match=named):
        IsopoTrainer(model, text_reward, args, dataset(), processing_class=processor, **lora)
