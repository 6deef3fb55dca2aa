"""How calls become token ids for one model, and which tokens end its answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sambay.data.tokenizer import TOKENIZER_CONFIG_FILE, Tokenizer
from sambay.errors import ConfigError, SambayError
from sambay.evals.calls import Call
from sambay.hf.chat import ChatFormat, Message, find_template
from sambay.hf.tokenizer import (
    context_limit,
    control_tokens,
    end_token_ids,
    read_settings,
    token_name,
)


class Prompts:
    """The text side of a model.

    chat: how conversations are written, or why they cannot be, which only a chat will say.
    prefix_id: the token that stands for the beginning of a text.
    max_context: what the model's own files call its limit, if they do.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        chat: ChatFormat | SambayError,
        *,
        prefix_id: int | None = None,
        max_context: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prefix_id = tokenizer.eos_id if prefix_id is None else prefix_id
        self.max_context = max_context
        self._end_ids = end_ids
        self._chat = chat
        self._known: dict[tuple[bool, str], np.ndarray] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """What decides how texts are read, as fingerprints."""
        chat = self._chat
        template = chat.template.source if isinstance(chat, ChatFormat) else None
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "chat_template_sha256": (
                None if template is None else hashlib.sha256(template.encode()).hexdigest()
            ),
        }

    def ids(self, call: Call) -> np.ndarray:
        """The prompt as uint32 ids; remembered, as lengths are asked for before answers.

        Raises:
            SambayError: an empty prompt, or a chat for which there is no template.
        """
        key = (call.chat, call.prompt)
        if key not in self._known:
            if call.chat:
                messages = [Message("user", call.prompt)]
                ids = np.array(self._required_chat().prompt(messages), np.uint32)
            else:
                ids = self.tokenizer.encode_array(call.prompt)
            if len(ids) == 0:
                raise ConfigError("a question has an empty prompt; check the data of the suite")
            self._known[key] = ids
        return self._known[key]

    def all_ids(self, calls: Sequence[Call]) -> list[np.ndarray]:
        """The prompts of all calls, which are forgotten here; raises as `ids` does."""
        ids = [self.ids(call) for call in calls]
        self._known.clear()
        return ids

    def end_ids(self, call: Call) -> frozenset[int]:
        """The tokens that end the answer to a call."""
        return self._end_ids | self._required_chat().turn_ends if call.chat else self._end_ids

    def _required_chat(self) -> ChatFormat:
        if isinstance(self._chat, SambayError):
            raise self._chat
        return self._chat


def open_prompts(
    tokenizer: Tokenizer, folder: Path, tokenizer_folder: Path, template: str | None = None
) -> Prompts:
    """The text side of a model folder.

    template: that of the option; a mistake in it is said now, a missing one when it is needed.

    Raises:
        SambayError: a template that was asked for and cannot be used, or damaged settings.
    """
    chat: ChatFormat | SambayError
    try:
        chat = ChatFormat(tokenizer, find_template([folder, tokenizer_folder], template))
    except SambayError as error:
        if template is not None:
            raise
        chat = error
    begin = token_name(read_settings(tokenizer_folder / TOKENIZER_CONFIG_FILE).get("bos_token"))
    controls = control_tokens(tokenizer)
    return Prompts(
        tokenizer,
        end_token_ids(folder, tokenizer),
        chat,
        prefix_id=controls[begin].id if begin in controls else None,
        max_context=context_limit(folder, tokenizer_folder),
    )
