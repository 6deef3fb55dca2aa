"""What cannot be served is refused before anything is loaded, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sambay.hf import official
from sambay.model.folder import save_model_folder
from sambay.serve import register
from tests.serve.served_models import NEEDS_VLLM, OFFICIAL, SIZES, environment
from tests.tiny import tiny_model

pytestmark = [NEEDS_VLLM, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in ("sambay", "samba", "sambay-aa", "sambay-2", "transformer-ls", "transformer++"):
        save_model_folder(root / name, tiny_model(name, dtype=torch.float32, **SIZES))
    only_mamba = tiny_model("mambay", dtype=torch.float32, **SIZES, layer_pattern="4xM")
    save_model_folder(root / "mamba", only_mamba)
    released = tiny_model("sambay+da", dtype=torch.float32, **SIZES | OFFICIAL)
    official.save(root / "official", released)
    return {path.name: path for path in root.iterdir()}


def configure(folder: Path, **options: Any) -> Any:
    """vLLM's complete configuration, for which no weight is read."""
    environment()
    from vllm.engine.arg_utils import EngineArgs

    plain = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512}
    return EngineArgs(model=str(folder), **(plain | options)).create_engine_config()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sambay", {"pipeline_parallel_size": 2}, "another process; use tensor_parallel_size"),
    ("sambay", {"tensor_parallel_size": 3}, "does not divide the 8 query heads.* 1, 2, 4, 8"),
    ("sambay-2", {"tensor_parallel_size": 2}, "'mamba2' runs undivided"),
    ("mamba", {}, "has no attention"),
    ("samba", {"kv_sharing_fast_prefill": True}, "this model has none behind its last layer"),
    ("sambay-aa", {"kv_sharing_fast_prefill": True}, "this model has none behind its last layer"),
    ("transformer++", {"kv_sharing_fast_prefill": True}, "this model has none"),
    ("sambay", {"kv_cache_dtype": "fp8"}, "kv_cache_dtype = 'fp8"),
    (
        "sambay", {"kv_sharing_fast_prefill": True, "enable_lora": True},
        "LoRA cannot be combined with kv_sharing_fast_prefill",
    ),
    ("sambay-2", {"enable_lora": True}, "LoRA is not supported with recurrent_kind"),
    ("sambay", {"enable_lora": True}, r"LoRA on a CPU: .* merge the adapter"),
    (
        "sambay",
        {
            "speculative_config": {
                "method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2,
            }
        },
        "recurrent states cannot be rolled back",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "words"), REFUSED, ids=[f"{n} {sorted(o)}" for n, o, _ in REFUSED]
)
def test_refused(name: str, options: dict[str, Any], words: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=words):
        configure(folders[name], **options)


def test_what_vllm_is_told(folders: dict[str, Path]) -> None:
    """Windows by layer and not for all of them; pairs of heads; the class by the layers."""
    register()
    register()  # again, as every process of vLLM does
    config = configure(folders["official"], kv_sharing_fast_prefill=True)
    served = config.model_config.hf_config
    assert config.model_config.architecture == "SambaYForCausalLM"
    assert config.model_config.is_hybrid
    assert config.cache_config.sliding_window is None
    assert served.sliding_window == 5
    assert (served.num_attention_heads, served.num_key_value_heads, served.head_dim) == (4, 1, 32)
    assert served.layers_block_type.count("mamba") == 3
    assert {"full_attention", "sliding_attention"} < set(served.layer_types)
    attention = configure(folders["transformer-ls"])
    assert attention.model_config.architecture == "SambaYAttentionForCausalLM"
    assert not attention.model_config.is_hybrid
    assert attention.cache_config.sliding_window is None


def test_a_broken_configuration_is_said_in_our_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "phi4flash", "architectures": ["Phi4FlashForCausalLM"]}'
    )
    with pytest.raises(ValueError, match="vocab_size is missing"):
        configure(tmp_path)
