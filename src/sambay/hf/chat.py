"""Conversations as token ids: the built-in Phi template, and the Jinja templates of model folders.

What people and models wrote is text: where it spells a control token it gives the tokens of those
characters, never the control token. Only the template's own control tokens count.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from sambay.data.tokenizer import TOKENIZER_CONFIG_FILE, Tokenizer
from sambay.errors import ConfigError, DataError, MissingPackage
from sambay.hf.tokenizer import CONFIG_FILE, control_tokens, read_settings, token_name

PHI4 = "phi4"
TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Characters with no meaning: they stand for others while a template is at work.
_FIRST_PRIVATE, _LAST_PRIVATE = 0x100000, 0x10FFFD
# Unicode's White_Space, as the tokenizers library strips it.
_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

Render = Callable[[Sequence[Mapping[str, str]], bool], str]
"""The text of messages (role, content), with or without the start of an answer behind them."""


@dataclass(frozen=True)
class Message:
    """One turn; `ids` are the tokens a model produced for `text`, kept as they are."""

    role: Literal["system", "user", "assistant"]
    text: str
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Template:
    """A way to write conversations.

    needs: tokens without which it makes no sense.
    literals: marks such as </think> that the template looks for in what was written.
    source: its text, or its name where it is built in.
    """

    render: Render
    needs: tuple[str, ...] = ()
    literals: frozenset[str] = frozenset()
    source: str = ""


class ChatFormat:
    """Encodes conversations for a tokenizer.

    Attributes:
        turn_ends: the control token behind an answer, if the template writes one.

    Raises:
        ConfigError: the tokenizer lacks a token that the template needs.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.controls = control_tokens(tokenizer)
        missing = [name for name in template.needs if name not in self.controls]
        if missing:
            raise ConfigError(
                f"the chat template needs the token '{missing[0]}', which the tokenizer does not "
                "have; give a template made for this tokenizer with --template FILE"
            )
        names = sorted(self.controls, key=len, reverse=True)  # of two that fit the longer one
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        marks = sorted(template.literals - self.controls.keys(), key=len, reverse=True)
        edges = sorted({edge for name in names for edge in (name[0], name[-1])})
        self._edges = edges
        self._maskable = re.compile("|".join(map(re.escape, (*marks, *edges))) or r"(?!)")
        self.turn_ends = self._find_turn_ends()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, up to where the model's next answer begins.

        Raises:
            ConfigError: the template refuses the conversation, or fails.
            DataError: text that is not Unicode.
        """
        return self._encode(messages, True)

    def _encode(self, messages: Sequence[Message], continues: bool) -> list[int]:
        private = _unused(message.text for message in messages)
        opaque_mark = next(private)
        mask = dict(zip(self._edges, private, strict=False))
        unmask = str.maketrans({mark: edge for edge, mark in mask.items()})
        # No control token can begin or end inside a masked text, whatever the template does to it.
        texts = [
            self._maskable.sub(lambda found: mask.get(found[0], found[0]), message.text)
            for message in messages
        ]
        rendered = self._render(messages, texts, continues)
        tokens = [message.ids for message in messages]
        if any(ids is not None for ids in tokens):
            # Known tokens stand in for their text only if the template leaves that text alone.
            marks = [f"{opaque_mark}{number}{opaque_mark}" for number in range(len(messages))]
            chosen = [
                text if ids is None else mark
                for text, ids, mark in zip(texts, tokens, marks, strict=True)
            ]
            opaque = self._render(messages, chosen, continues)
            pattern = re.compile(f"{opaque_mark}(\\d+){opaque_mark}")
            if pattern.sub(lambda found: texts[int(found[1])], opaque) == rendered:
                pieces = pattern.split(opaque)
                return list(self._joined(pieces, tokens, unmask))
        return list(self._joined([rendered], tokens, unmask))

    def _joined(
        self,
        pieces: Sequence[str],
        tokens: Sequence[tuple[int, ...] | None],
        unmask: Mapping[int, str],
    ) -> Iterator[int]:
        """Ids of template text (even places) and of known tokens, by message number (odd ones)."""
        for place, piece in enumerate(pieces):
            if place % 2:
                yield from tokens[int(piece)] or ()
                continue
            start = 0
            strips = False
            for found in (*self._names.finditer(piece), None):
                end = len(piece) if found is None else found.start()
                control = None if found is None else self.controls[found[0]]
                text = piece[start:end].translate(unmask)
                text = text.lstrip(_WHITE) if strips else text
                if control is not None and control.strips_left:
                    text = text.rstrip(_WHITE)
                yield from self._plain(text)
                if found is not None and control is not None:
                    yield control.id
                    start, strips = found.end(), control.strips_right

    def _plain(self, text: str) -> list[int]:
        """Tokens of a text without any control token."""
        if not text:
            return []
        ids = self.tokenizer.encode(text)
        forbidden = {control.id for control in self.controls.values()}
        if forbidden.isdisjoint(ids):
            return ids
        # The library finds added tokens that are not declared special in every text: cut them.
        cuts = [0, *(found.start() + 1 for found in self._names.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in pairwise(cuts)]
        ids = [token for part in parts for token in self.tokenizer.encode(part)]
        if not forbidden.isdisjoint(ids):
            raise DataError(
                "the text spells a control token that this tokenizer cannot read as plain text; "
                "leave it out"
            )
        return ids

    def _render(self, messages: Sequence[Message], texts: Sequence[str], continues: bool) -> str:
        turns = [
            {"role": message.role, "content": text}
            for message, text in zip(messages, texts, strict=True)
        ]
        return self.template.render(turns, continues)

    def _find_turn_ends(self) -> frozenset[int]:
        mark = chr(_FIRST_PRIVATE)
        try:
            text = self.template.render(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}], False
            )
        except ConfigError:
            return frozenset()  # the first prompt will say why
        found = self._names.search(text.rpartition(mark)[2])
        return frozenset() if found is None else frozenset({self.controls[found[0]].id})


def find_template(folders: Sequence[Path], choice: str | None = None) -> Template:
    """The template to use with a model.

    folders: the model's, then that of its tokenizer if it is another one.
    choice: "phi4", a file with a Jinja template, or None: the folders' own chat_template.jinja or
        `chat_template` in tokenizer_config.json; without these, Phi's for an official checkpoint.

    Raises:
        ConfigError: no template, or a file that cannot be read.
        MissingPackage: jinja2 is not installed and the template is not the built-in one.
    """
    if choice == PHI4:
        return _PHI4_TEMPLATE
    special = _special_tokens(folders)
    if choice is not None:
        return _jinja_template(_read(Path(choice)), choice, special)
    for folder in folders:
        file = folder / TEMPLATE_FILE
        if file.exists():
            return _jinja_template(_read(file), str(file), special)
        source = read_settings(folder / TOKENIZER_CONFIG_FILE).get("chat_template")
        if isinstance(source, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in source}
            source = named.get("default", next(iter(named.values()), None))
        if isinstance(source, str):
            return _jinja_template(source, str(folder / TOKENIZER_CONFIG_FILE), special)
    if read_settings(folders[0] / CONFIG_FILE).get("model_type") == "phi4flash":
        return _PHI4_TEMPLATE
    raise ConfigError(
        f"{folders[0]} has no chat template ({TEMPLATE_FILE}, or chat_template in "
        f"{TOKENIZER_CONFIG_FILE}); give --template {PHI4} or --template FILE"
    )


def _render_phi4(messages: Sequence[Mapping[str, str]], continues: bool) -> str:
    turns = [f"<|{message['role']}|>{message['content']}<|end|>" for message in messages]
    return "".join(turns) + ("<|assistant|>" if continues else "")


_PHI4_TEMPLATE = Template(
    _render_phi4, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), source=PHI4
)


def _jinja_template(source: str, name: str, special: Mapping[str, str]) -> Template:
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise MissingPackage("jinja2", f"the chat template of {name}", "hf") from error

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    # The environment that transformers gives to chat templates.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    # {% generation %} marks answers for training and prints nothing.
    runnable = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    runnable = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", runnable)
    try:
        compiled = environment.from_string(runnable)
    except jinja2.TemplateError as error:
        raise ConfigError(f"{name}: the chat template is no Jinja template ({error})") from error

    def render(messages: Sequence[Mapping[str, str]], continues: bool) -> str:
        try:
            return compiled.render(
                messages=messages, add_generation_prompt=continues, tools=None, documents=None,
                **special,
            )  # fmt: skip
        except (
            jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError,
            ValueError,
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"{name}: the chat template refuses this conversation ({reason})"
            ) from error

    literals = frozenset(re.findall(r"</?\w+>|\[/?\w+\]", source))
    return Template(render, literals=literals, source=source)


def _special_tokens(folders: Sequence[Path]) -> dict[str, str]:
    names: dict[str, str] = {}
    for folder in reversed(folders):
        settings = read_settings(folder / TOKENIZER_CONFIG_FILE)
        found = {name: token_name(settings.get(name)) for name in _SPECIAL_NAMES}
        names |= {name: token for name, token in found.items() if token is not None}
    return names


def _unused(texts: Iterable[str]) -> Iterator[str]:
    """Private characters that occur in none of the texts."""
    used = set().union(*texts)
    every = map(chr, range(_FIRST_PRIVATE, _LAST_PRIVATE))
    return (character for character in every if character not in used)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat template {file} cannot be read ({error}); give --template {PHI4} or the path "
            "of a Jinja template"
        ) from error
