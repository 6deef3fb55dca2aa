"""TRL's trainers on tiny models: the losses they compute and that they learn; all offline."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the classes of transformers are not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")

from datasets import Dataset  # noqa: E402

from sambay.hf.lora import target_modules  # noqa: E402
from tests.hf.tiny_chat import chat_model, chat_tokenizer  # noqa: E402
from tests.hf.tiny_hf import OFFICIAL  # noqa: E402

NATIVE = "sambay+da"
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"{a}+{b}" + "?" * (a + 1)},
            {"role": "assistant", "content": str(a * b) * (b + 1)},
        ]
    }
    for a in range(3)
    for b in range(3)
]
PAIRS = [
    {
        "prompt": row["messages"][:1],
        "chosen": row["messages"][1:],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for row in CONVERSATIONS
]


def options(out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "max_steps": 6,
        "learning_rate": 1e-2,
    } | changes


def sft(out: Path, model: Any, peft_config: Any = None, **changes: Any) -> Any:
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**options(out, **changes)),
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=chat_tokenizer(),
        peft_config=peft_config,
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == trainer.args.max_steps
    assert all(math.isfinite(loss) for loss in found)
    return found


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """(T - 1,) the log-probability of every next token of one row."""
    return logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (NATIVE, {"assistant_only_loss": True}),
        (OFFICIAL, {"packing": True, "max_length": 48}),
        (NATIVE, {"packing": True, "max_length": 48, "bf16": True}),
    ],
    ids=["answers only", "official, packed", "autocast, packed"],
)
def test_sft_learns(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = chat_model(name)
    frozen_in_float32 = model.model.blocks[0].mixer.A_log
    found = losses(sft(tmp_path, model, **changes))
    assert found[-1] < 0.8 * found[0]
    assert frozen_in_float32.dtype is torch.float32
    assert bool(frozen_in_float32.grad is None or torch.isfinite(frozen_in_float32.grad).all())


def test_packed_documents_do_not_see_each_other(tmp_path: Path) -> None:
    """Per token, what TRL computes for a packed row is what each document gives alone."""
    trainer = sft(tmp_path, chat_model(), packing=True, max_length=48)
    alone = chat_model()
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch, "positions say where documents start"
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), None]
    assert len(starts) > 5
    for training in (True, False):
        trainer.model.train(training)
        outputs = trainer.model(**batch, fused_lm_head=True)
        rows = trainer.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"]
        )  # as a plain Trainer calls it, with the cache the configuration asks for
        assert rows.past_key_values is None
        for first, end in itertools.pairwise(starts):
            ids = batch["input_ids"][:, first:end]
            expected = log_probs(alone(ids).logits, ids)
            last = None if end is None else end - 1
            torch.testing.assert_close(outputs.log_probs[0, first:last], expected)
            torch.testing.assert_close(log_probs(rows.logits[:, first:end], ids), expected)


def test_the_loss_on_hidden_states_is_that_of_the_logits(tmp_path: Path) -> None:
    """TRL never forms the logits; its shortcut must know everything our head does."""
    for name in (NATIVE, OFFICIAL):
        trainer = sft(tmp_path, chat_model(name))
        batch = next(iter(trainer.get_train_dataloader()))
        assert not bool(batch["attention_mask"].all()), "rows of different lengths"
        fused = trainer.model(**batch, fused_lm_head=True).loss
        torch.testing.assert_close(fused, chat_model(name)(**batch).loss)


def test_only_answers_are_learned(tmp_path: Path) -> None:
    trainer = sft(tmp_path, chat_model(), assistant_only_loss=True)
    tokenizer = chat_tokenizer()
    for row, given in zip(trainer.train_dataset, CONVERSATIONS, strict=True):
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learned) == given["messages"][1]["content"] + "<|end|>"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_learns(lora: bool, tmp_path: Path) -> None:
    model = chat_model()
    peft_config = None
    if lora:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        peft_config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=target_modules(model.config)
        )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=None if lora else chat_model(),
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=chat_tokenizer(),
        peft_config=peft_config,
    )
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-4), "policy and reference start equal"
    assert found[-1] < 0.9 * found[0]


def test_grpo_generates_and_learns(tmp_path: Path) -> None:
    """Prompts of different lengths are padded on the left and continued by our generate."""
    seen: list[str] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        seen.extend(texts)
        return [float(sum(character.islower() for character in text)) for text in texts]

    model = chat_model()
    before = model.lm_head.weight.detach().clone()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            **options(tmp_path, max_steps=2, per_device_train_batch_size=6),
            num_generations=3,
            max_completion_length=6,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        processing_class=chat_tokenizer(),
    )
    losses(trainer)
    assert len(seen) == 12
    assert len(set(seen)) > 6, "sampled"
    assert not torch.equal(model.lm_head.weight, before)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
