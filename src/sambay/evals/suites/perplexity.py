"""Perplexity of long documents by a sliding window, and the loss against the position."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sambay.errors import ConfigError
from sambay.evals.calls import Backend, Passage, Score
from sambay.evals.journal import Journal
from sambay.evals.result import Result, sha256_of_json
from sambay.evals.runner import Pace, Progress
from sambay.evals.statistics import Metric
from sambay.evals.tasks.selection import check_whole
from sambay.evals.tasks.texts import read_texts
from sambay.evals.tasks.windows import Piece, bucket, pieces, ratio
from sambay.plots.curves import Curve, Panel, draw_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOKENS_AT_ONCE = 1 << 22  # given to the backend, which bounds the memory for windows that overlap


@dataclass(frozen=True)
class Document:
    """A document's tokens, the bytes of its text, and its pieces."""

    tokens: list[int]
    num_bytes: int
    sha256: str
    pieces: list[Piece]


@dataclass(frozen=True)
class PerplexitySuite:
    """Every token scored once, behind at least `length` - `stride` others of its document.

    text: a file or folder of texts, JSON lines or parquet, or a prepared data set, whose validation
        split is taken. Texts are encoded by the model's own tokenizer; what ends a document is not
        scored.
    length: tokens of a window. At the beginning of a document the token that stands for it comes in
        front, so a model needs a context of `length` + 1.
    stride: tokens that a window adds to the one before it (half the length); `length` makes
        disjoint windows, each read for itself.
    text_field: the field of JSON lines and parquet.
    min_tokens: leave shorter documents out, so that late positions are of the same documents as
        early ones.
    limit: only the first documents, counted before short ones are left out.

    Raises:
        ConfigError: a setting that cannot work.
    """

    name: ClassVar[str] = "perplexity"

    text: Path
    length: int = 4096
    stride: int | None = None
    text_field: str = "text"
    min_tokens: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        check_whole("length", self.length, least=2)
        check_whole("min_tokens", self.min_tokens, least=1)
        if self.limit is not None:
            check_whole("limit", self.limit, least=1)
        if self.stride is None:
            object.__setattr__(self, "stride", self.length // 2)
        check_whole("stride", self.stride, least=1)
        if self.step > self.length:
            raise ConfigError(
                f"stride = {self.stride} is more than length = {self.length}; tokens between the "
                "windows would be left out"
            )

    @property
    def step(self) -> int:
        assert self.stride is not None
        return self.stride

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is asked and what counts; the texts have a fingerprint."""
        return {
            "length": self.length,
            "stride": self.stride,
            "text_field": self.text_field,
            "min_tokens": self.min_tokens,
            "limit": self.limit,
        }

    def evaluate(
        self, backend: Backend, out: Path, *, on_progress: Progress | None = None
    ) -> Result:
        """The result, written to OUT/result.json; may be interrupted and called again.

        Raises:
            DataError: no text.
            ConfigError: no document long enough, windows that do not fit the model's context (both
                before any is scored), or OUT holds another evaluation.
            SambayError: what the backend raises.
        """
        documents = self.documents(backend, out)
        digest = sha256_of_json([[one.sha256, len(one.tokens)] for one in documents])
        identity = {
            "suite": self.name,
            "settings": self.settings,
            "items_sha256": digest,
            "model": backend.facts,
        }
        with Journal(out, identity) as journal:
            _score(documents, backend, journal, on_progress)
            nats = [
                [float(journal.records[_key(number, piece)]["nats"]) for piece in document.pieces]
                for number, document in enumerate(documents)
            ]
            metrics, details = self.summarise(documents, nats)
            result = Result(self.name, self.settings, digest, backend.facts, metrics, details)
            result.write(out)
        return result

    def documents(self, backend: Backend, out: Path) -> list[Document]:
        """The documents that are asked.

        Raises:
            DataError: no text.
            ConfigError: no document long enough, or windows that do not fit the model's context.
        """
        found = []
        for text in read_texts(self.text, out, field=self.text_field, limit=self.limit):
            tokens, data = backend.encode(text), text.encode()
            if len(tokens) >= self.min_tokens:
                parts = pieces(len(tokens), self.length, self.step)
                found.append(Document(tokens, len(data), hashlib.sha256(data).hexdigest(), parts))
        if not found:
            raise ConfigError(
                f"min_tokens = {self.min_tokens}: no document of {self.text} has so many; ask for "
                "fewer, or give longer texts"
            )
        longest = min(self.length, max(len(document.tokens) for document in found)) + 1
        if backend.max_context is not None and longest > backend.max_context:
            raise ConfigError(
                f"length = {self.length} needs a context of {longest} tokens, the model's is "
                f"{backend.max_context}; use length={backend.max_context - 1}, or raise the "
                "limit with --max-context if the model can take it"
            )
        return found

    def summarise(
        self, documents: Sequence[Document], nats: Sequence[Sequence[float]]
    ) -> tuple[dict[str, Metric], dict[str, Any]]:
        """`perplexity@LENGTH` and `loss@LENGTH` per token, `bits_per_byte@LENGTH`, by position.

        Standard errors are over documents, or over the pieces of a single one.
        """
        totals = [math.fsum(parts) for parts in nats]
        tokens = [len(document.tokens) for document in documents]
        num_bytes = sum(document.num_bytes for document in documents)
        bits = math.fsum(totals) / math.log(2) / num_bytes
        if len(documents) > 1:
            parts: list[tuple[float, float]] = list(zip(totals, tokens, strict=True))
            sizes = [document.num_bytes for document in documents]
            bits_error = ratio(list(zip(totals, sizes, strict=True)))[1]
        else:
            lengths = [piece.end - piece.start for piece in documents[0].pieces]
            parts = list(zip(nats[0], lengths, strict=True))
            error = ratio(parts)[1]
            bits_error = None if error is None else error * sum(tokens) / num_bytes
        loss, loss_error = ratio(parts)
        count = len(parts)
        perplexity = math.exp(loss)
        found = {
            "perplexity": (perplexity, None if loss_error is None else perplexity * loss_error),
            "loss": (loss, loss_error),
            "bits_per_byte": (bits, None if bits_error is None else bits_error / math.log(2)),
        }
        metrics = {
            f"{name}@{self.length}": Metric(value, error, count)
            for name, (value, error) in found.items()
        }
        details = {
            "errors_over": "documents" if len(documents) > 1 else "pieces",
            "positions": _by_position(documents, nats),
            "documents": [
                {
                    "sha256": document.sha256,
                    "tokens": len(document.tokens),
                    "bytes": document.num_bytes,
                    "nats": total,
                }
                for document, total in zip(documents, totals, strict=True)
            ],
        }
        return metrics, details

    def pictures(self, result: Result) -> dict[str, Figure]:
        """The loss against the position in the document.

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        positions = result.details["positions"]
        curve = Curve(
            result.model.get("name", "model"),
            [place["to"] for place in positions],
            [place["loss"] for place in positions],
        )
        panel = Panel(
            "Loss against position", "tokens from the beginning, up to", [curve],
            x_in_powers_of_two=True,
        )  # fmt: skip
        caption = f"Nats per token; window {self.length}, stride {self.stride}."
        return {"position": draw_panels([panel], caption)}


def _by_position(
    documents: Sequence[Document], nats: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """The loss in ranges of positions, from the beginning; errors are over documents."""
    found: dict[tuple[int, int], dict[int, tuple[float, float]]] = {}
    for number, (document, parts) in enumerate(zip(documents, nats, strict=True)):
        for piece, amount in zip(document.pieces, parts, strict=True):
            by_document = found.setdefault(bucket(piece.start), {})
            before, count = by_document.get(number, (0.0, 0.0))
            by_document[number] = (before + amount, count + piece.end - piece.start)
    rows = []
    for (low, high), by_document in sorted(found.items()):
        loss, stderr = ratio(list(by_document.values()))
        tokens = int(sum(count for _, count in by_document.values()))
        row = {"from": low, "to": high, "loss": loss, "stderr": stderr}
        rows.append(row | {"tokens": tokens, "documents": len(by_document)})
    return rows


def _score(
    documents: Sequence[Document],
    backend: Backend,
    journal: Journal,
    on_progress: Progress | None,
) -> None:
    total = sum(len(document.pieces) for document in documents)
    missing = [
        (number, piece)
        for number, document in enumerate(documents)
        for piece in document.pieces
        if _key(number, piece) not in journal.records
    ]
    pace = Pace(total, total - len(missing), on_progress)
    pace.show()
    for group in _groups(missing):
        passages: list[Passage] = [
            piece.passage(documents[number].tokens, backend.prefix_id) for number, piece in group
        ]

        def keep(index: int, score: Score, group: list[tuple[int, Piece]] = group) -> None:
            number, piece = group[index]
            place = {"document": number, "start": piece.start, "end": piece.end}
            journal.add(_key(number, piece), {**place, "nats": -score.logprob})
            pace.advance(None)

        backend.score(passages, keep)


def _groups(missing: Sequence[tuple[int, Piece]]) -> Iterator[list[tuple[int, Piece]]]:
    group: list[tuple[int, Piece]] = []
    size = 0
    for number, piece in missing:
        if group and size + piece.end - piece.begin > _TOKENS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append((number, piece))
        size += piece.end - piece.begin
    if group:
        yield group


def _key(number: int, piece: Piece) -> str:
    return f"{number}/{piece.start}-{piece.end}"
