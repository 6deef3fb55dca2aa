"""Text from tokens as they arrive, never half of a character."""

from __future__ import annotations

import codecs

from sambay.data.tokenizer import Tokenizer


class StreamDecoder:
    """Turns one token after another into text that can be shown at once.

    The concatenation of all results equals `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; "" inside a character."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))
        # Other tokenizers may write a token differently at the start of a text (a blank is
        # dropped), so the last tokens are decoded twice: without and with the new ones.
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._shown_text()) :]
        if new:
            self._context, self._shown = self._shown, len(self._ids)
        return new

    def finish(self) -> str:
        """What is left: an unfinished character appears as U+FFFD."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        text = self._tokenizer.decode(self._ids[self._context :])
        new = text[len(self._shown_text()) :]
        self._context = self._shown = len(self._ids)
        return new

    def _shown_text(self) -> str:
        return self._tokenizer.decode(self._ids[self._context : self._shown])
