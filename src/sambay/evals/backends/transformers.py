"""transformers' `generate` as a backend: our registered classes, or any other local model.

Prompts, ends and the choice of tokens are ours, so that in float32 it gives what the engine gives;
the forward, the cache and the loop are transformers'.

Shape letters: B rows, T columns, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sambay.errors import CheckpointMismatch, ConfigError, MissingPackage
from sambay.evals.backends.identity import architecture_facts
from sambay.evals.backends.prompts import Prompts, open_prompts
from sambay.evals.backends.scoring import ScoreBatch, Tally, plan_scores
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.generate.batch import RunningBatch
from sambay.generate.requests import Request, TokenEvent, plan_batches
from sambay.generate.text import TextReader
from sambay.hf.tokenizer import find_tokenizer, load_tokenizer, read_settings

ROWS = 8
"""Rows of a batch where no number is given: what a foreign cache needs cannot be known before."""

_CHUNK = 512  # tokens per call when scoring, which bounds the logits
_OURS = ("sambay", "phi4flash")


class TransformersBackend:
    """A backend (`sambay.evals.calls.Backend`) on a model of transformers with a language head.

    facts: those that the caller knows, such as name and hash of the weights.
    batch_size: rows at once (`ROWS`).
    max_context: None takes what the model's files say, if they do.

    Raises:
        ConfigError: the tokenizer has ids that the model does not know.
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        facts: dict[str, Any],
        *,
        batch_size: int | None = None,
        max_context: int | None = None,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._vocab_size: int = model.get_input_embeddings().weight.shape[0]
        if prompts.tokenizer.vocab_size > self._vocab_size:
            raise ConfigError(
                f"the tokenizer has {prompts.tokenizer.vocab_size} tokens, the model's vocab_size "
                f"is {self._vocab_size}; use the tokenizer that belongs to the model"
            )
        self._batch_size = batch_size
        self.max_context = prompts.max_context if max_context is None else max_context
        self.prefix_id = prompts.prefix_id
        self.facts = {
            **facts,
            "backend": "transformers",
            **prompts.facts,
            **_architecture(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return self._prompts.tokenizer.encode(text)

    def prompt_length(self, call: Call) -> int:
        """The tokens of a call's prompt, chat template included."""
        return len(self._prompts.ids(call))

    def generate(self, calls: Sequence[Call], on_answer: Callable[[int, Answer], None]) -> None:
        """Answer every call, the longest prompts first.

        Raises:
            ConfigError: an empty prompt or stop string, a chat without a template.
        """
        prompts = self._prompts.all_ids(calls)
        ends = [self._prompts.end_ids(call) for call in calls]
        readers = [
            TextReader(self._prompts.tokenizer, call.stop, ids)
            for call, ids in zip(calls, ends, strict=True)
        ]
        requests = [
            Request(ids, call.max_new_tokens, call.sampling, reader.stop_token_ids, reader.read)
            for ids, call, reader in zip(prompts, calls, readers, strict=True)
        ]
        produced = [0] * len(calls)

        def take(event: TokenEvent) -> None:
            number = event.request
            produced[number] += 1
            if event.finish_reason is not None:
                readers[number].finish()
                text = readers[number].text
                on_answer(number, Answer(text, produced[number], event.finish_reason))

        batches = plan_batches(
            [len(ids) for ids in prompts],
            [call.max_new_tokens for call in calls],
            self._batch_size or ROWS,
            lambda rows, columns: True,
        )
        for batch in batches:
            self._run(batch, [requests[number] for number in batch], take)

    def _run(
        self,
        numbers: Sequence[int],
        requests: Sequence[Request],
        take: Callable[[TokenEvent], None],
    ) -> None:
        device = self._model.device
        prompts = [torch.tensor(request.prompt, dtype=torch.int64) for request in requests]
        longest = max(map(len, prompts))
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for number, prompt_T in enumerate(prompts):
            ids_BT[number, longest - len(prompt_T) :] = prompt_T
            mask_BT[number, longest - len(prompt_T) :] = 1
        chooser = _Chooser(RunningBatch(numbers, requests, prompts, self._vocab_size, device), take)
        limits = [request.max_new_tokens for request in requests]
        settings = _library().GenerationConfig(
            max_new_tokens=max(limit for limit in limits if limit is not None),
            do_sample=False,
            use_cache=True,
            pad_token_id=self._prompts.tokenizer.eos_id,
        )
        self._model.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=settings,
            logits_processor=[chooser.choose],
            stopping_criteria=[chooser.is_done],
        )

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        """Score every passage, the longest first.

        Raises:
            ConfigError: a passage that cannot be scored; nothing was computed.
        """
        batches = plan_scores(
            passages,
            vocab_size=self._vocab_size,
            max_context=self.max_context,
            tokens_per_call=_CHUNK,
            max_rows=self._batch_size,
        )
        for batch in batches:
            for number, score in self._scores(batch):
                on_score(number, score)

    @torch.inference_mode()
    def _scores(self, batch: ScoreBatch) -> list[tuple[int, Score]]:
        """Rows begin together, so positions are right and causality hides the padding behind."""
        model = self._model
        ids_BT = batch.left_aligned().to(model.device)
        # Other models with recurrent states may lose them when a second call has several columns.
        can_go_on = model.config.model_type in _OURS or not getattr(model, "_is_stateful", False)
        step = max(1, _CHUNK // batch.num_rows) if can_go_on else batch.width
        tally = Tally(batch, lambda logits_PV: logits_PV)
        cache = None
        for begin in range(0, batch.width, step):
            end = min(begin + step, batch.width)
            wanted = range(max(begin, min(batch.first, end)), end)
            outputs = model(
                ids_BT[:, begin:end],
                past_key_values=cache,
                use_cache=step < batch.width,
                **self._keeping(max(1, len(wanted))),
            )
            cache = outputs.past_key_values
            if wanted:
                logits_BTV = outputs.logits[:, -len(wanted) :]
                tally.add(logits_BTV, [wanted.start] * batch.num_rows)
        return tally.scores()

    def _keeping(self, count: int) -> dict[str, Any]:
        """The argument that restricts the head to the last `count` columns, if there is one."""
        known = inspect.signature(self._model.forward).parameters
        return {"logits_to_keep": count} if "logits_to_keep" in known else {}


class _Chooser:
    """Chooses tokens as the engine does, each row with its own settings and random stream.

    transformers takes the likeliest token, so every other one is made impossible; and it asks
    after every step which rows are done.
    """

    def __init__(self, batch: RunningBatch, take: Callable[[TokenEvent], None]) -> None:
        self._batch = batch
        self._take = take
        self._logprobs: list[float] = []

    def choose(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        """Scores that leave one token to every row."""
        self._logprobs = self._batch.choose(scores_BV)
        only_BV = torch.full_like(scores_BV, float("-inf"))
        return only_BV.scatter(1, self._batch.tokens_B[:, None], 0.0)

    def is_done(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows have ended, after telling their tokens."""
        for event in self._batch.record(self._logprobs, has_room=True):
            self._take(event)
        return torch.tensor([row.finished for row in self._batch.rows], device=input_ids.device)


def load_transformers(
    folder: Path,
    *,
    tokenizer: Path | None = None,
    template: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, Prompts]:
    """The model of a local folder in evaluation mode, and its text side; nothing is downloaded.

    dtype: None takes that of the weights.

    Raises:
        CheckpointMismatch: not a folder that transformers can read.
        MissingPackage: transformers is not installed.
        SambayError: anything wrong with the tokenizer or the template.
    """
    if not (folder / "config.json").is_file() or "model_type" not in read_settings(
        folder / "config.json"
    ):
        raise CheckpointMismatch(
            f"{folder} has no config.json of a model; --backend transformers reads model folders, "
            "a training run directory or a checkpoint is for --backend engine"
        )
    library = _library()
    file = find_tokenizer(folder, tokenizer)
    prompts = open_prompts(load_tokenizer(file, folder), folder, file.parent, template)
    try:
        model = library.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype or "auto", local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, CheckpointMismatch):
            raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointMismatch(f"transformers cannot load {folder}: {reason}") from error
    # Defaults of the folder (sampling, penalties) must not mix with what a call asks for.
    model.generation_config = library.GenerationConfig()
    return model.to(device).eval(), prompts


def _library() -> Any:
    """The `transformers` module; outside `hf` this file is the only one that imports it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage("transformers", "the backend 'transformers'", "hf") from error
    return transformers


def _architecture(model: Any) -> dict[str, Any]:
    """What our own classes know of themselves; nothing of other models."""
    config = getattr(model.config, "model_config", None)
    return {} if config is None else architecture_facts(config())
