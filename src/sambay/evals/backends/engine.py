"""Our engine as a backend: linear prefill, batches by memory, scores from the cache's last part.

Shape letters: B rows, T columns, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sambay.evals.backends.identity import architecture_facts
from sambay.evals.backends.prompts import Prompts
from sambay.evals.backends.scoring import ScoreBatch, Tally, plan_scores
from sambay.evals.calls import Answer, Call, Passage, Score
from sambay.generate.memory import require_memory
from sambay.generate.requests import Completion, Request
from sambay.generate.text import TextGenerator, TextReader
from sambay.model import LanguageModel, ModelCache

MOST_ROWS = 64
"""Rows of a batch where no number is given; memory allows fewer when prompts are long."""

# A call of this many tokens keeps the processor busy; more would only be filled up more often.
_TOKENS_PER_CALL = {"cpu": 1024}
_TOKENS_PER_ACCELERATOR_CALL = 16_384


class EngineBackend:
    """A backend (`sambay.evals.calls.Backend`) on a model of this package.

    facts: those that the caller knows, such as name and hash of the weights.
    batch_size: most rows at once; None takes what memory allows, up to `MOST_ROWS`.
    max_context: None takes what the model's files say, if they do.
    """

    def __init__(
        self,
        generator: TextGenerator,
        prompts: Prompts,
        facts: dict[str, Any],
        *,
        batch_size: int | None = None,
        max_context: int | None = None,
    ) -> None:
        self._engine = generator.engine
        self._prompts = prompts
        self._batch_size = batch_size
        self.max_context = prompts.max_context if max_context is None else max_context
        self.prefix_id = prompts.prefix_id
        model = self._engine.model
        self.facts = {
            **facts,
            "backend": "engine",
            **prompts.facts,
            **architecture_facts(model.config),
            "dtype": str(self._engine.dtype).removeprefix("torch."),
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
            NotEnoughMemory: a single prompt does not fit; nothing was computed.
        """
        readers: list[TextReader] = []
        requests: list[Request] = []
        for call, ids in zip(calls, self._prompts.all_ids(calls), strict=True):
            ends = self._prompts.end_ids(call)
            readers.append(TextReader(self._prompts.tokenizer, call.stop, ends))
            requests.append(
                Request(ids, call.max_new_tokens, call.sampling, ends, readers[-1].read)
            )

        def finish(number: int, completion: Completion) -> None:
            assert completion.finish_reason is not None
            readers[number].finish()
            text, length = readers[number].text, len(completion.tokens)
            on_answer(number, Answer(text, length, completion.finish_reason))

        self._engine.generate_many(
            requests, max_batch_size=self._batch_size or MOST_ROWS, on_finished=finish
        )

    def score(self, passages: Sequence[Passage], on_score: Callable[[int, Score], None]) -> None:
        """Score every passage, the longest first.

        Raises:
            ConfigError: a passage that cannot be scored; nothing was computed.
            NotEnoughMemory: the longest does not fit; nothing was computed.
        """
        engine = self._engine
        batches = plan_scores(
            passages,
            vocab_size=engine.model.config.vocab_size,
            max_context=self.max_context,
            tokens_per_call=_TOKENS_PER_CALL.get(engine.device.type, _TOKENS_PER_ACCELERATOR_CALL),
            max_rows=self._batch_size,
        )
        for batch in batches[:1]:
            require_memory(
                engine.model.config,
                batch.num_rows,
                batch.width,
                chunk=engine.prefill_chunk,
                value_bytes=engine.dtype.itemsize,
                device=engine.device,
            )
        for batch in batches:
            for number, score in self._scores(batch):
                on_score(number, score)

    @torch.inference_mode()
    def _scores(self, batch: ScoreBatch) -> list[tuple[int, Score]]:
        """What leads up to the continuations takes the linear prefill, the rest the whole model."""
        model, device = self._engine.model, self._engine.device
        ids_BT, starts = batch.right_aligned()
        ids_BT = ids_BT.to(device)
        cache = ModelCache.allocate(
            model.config,
            batch.num_rows,
            batch.width,
            dtype=self._engine.dtype,
            device=device,
            starts=starts.to(device),
        )
        tally = Tally(batch, lambda h_PD: model.logits(h_PD[None])[0])
        lead = batch.width - batch.span
        step = max(1, self._engine.prefill_chunk // batch.num_rows)
        for begin in range(0, lead, step):
            model.hidden_states(
                ids_BT[:, begin : min(begin + step, lead)], cache=cache, outputs="none"
            )
        for begin in range(lead, batch.width, step):
            h_BTD = model.hidden_states(ids_BT[:, begin : begin + step], cache=cache, outputs="all")
            tally.add(h_BTD, [begin - start for start in starts.tolist()])
        return tally.scores()


@torch.inference_mode()
def score_plainly(model: LanguageModel, passage: Passage) -> Score:
    """The score of one passage from one full forward: no cache, no padding, no pieces."""
    ids = [*passage.context, *passage.continuation]
    logits_TV = model(torch.tensor([ids[:-1]], device=model.head_weight.device))[0].float()
    logits_TV = logits_TV[len(passage.context) - 1 :]
    targets = list(passage.continuation)
    logprobs_TV = logits_TV.log_softmax(-1)
    chosen = [float(logprobs_TV[place, token]) for place, token in enumerate(targets)]
    return Score(math.fsum(chosen), logits_TV.argmax(-1).tolist() == targets)
