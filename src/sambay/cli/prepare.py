"""Turn text, source code, JSON lines and Parquet into token shards for training.

Files may be compressed (.gz, .zst); JSON lines are files named .jsonl, .ndjson or .json.gz. The
same input gives the same bytes, whatever the number of processes; a run that was killed continues
when the command is repeated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from sambay.data.prepare import Prepared

_LINE_SECONDS = 5.0
_SHOWN_NAMES = 5
# What the counts of a manifest mean, in the order of the summary.
_LEFT_OUT = {
    "empty": "empty texts",
    "binary": "binary texts (NUL bytes)",
    "undecodable": "texts that are not UTF-8",
    "invalid_records": "lines that are no JSON object",
    "missing_text": "records without the text field",
    "not_selected": "records of other values than --only",
    "unknown_ids": "packed records with ids that --packed-tokenizer has not",
    "no_records": "files without packed records",
    "unreadable_files": "unreadable files",
    "repeated_files": "files met a second time",
    "excluded": "files or folders excluded by pattern",
    "hidden": "hidden files or folders",
    "folder_links": "links to folders",
    "special_files": "special files",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sambay prepare`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file or folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a byte-level BPE tokenizer of this size"
    )
    tokenizer.add_argument(
        "--tokenizer", metavar="PATH", help="use this tokenizer.json, or the one in this folder"
    )
    parser.add_argument(
        "--eos-token", metavar="TOKEN", help="end-of-sequence token, if PATH does not name it"
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of JSON lines, column of Parquet (default: text)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="read only records with this value, such as meta.source=books (repeatable)",
    )
    parser.add_argument(
        "--packed-tokenizer",
        metavar="PATH",
        help="records hold input_ids of this tokenizer and indices of documents: decode them",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="take only these files of folders, such as '*.py' (repeatable)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave out these files or folders, such as tests (repeatable)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the documents held out, chosen by their content (default: 0.01)",
    )
    parser.add_argument(
        "--document-separator",
        default="",
        metavar="TEXT",
        help=r"cut plain texts into documents here, such as '<|endoftext|>' or '\n\n'",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=16 << 20,
        metavar="N",
        help="cut longer texts at line breaks into several documents (default: 16 MiB)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        metavar="N",
        help="tokens per shard, about (default: 64 shards of 1 to 256 MiB of text)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one per processor)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what DIR holds of another input or setting"
    )


def run(args: argparse.Namespace) -> None:
    """Prepare, and print what was made and what was left out."""
    from sambay.data.prepare import prepare
    from sambay.data.settings import PrepareSettings

    settings = PrepareSettings(
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        eos_token=args.eos_token,
        text_field=args.text_field,
        only=tuple(args.only),
        packed_tokenizer=args.packed_tokenizer,
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        validation_fraction=args.validation_fraction,
        shard_tokens=args.shard_tokens,
        max_document_bytes=args.max_document_bytes,
        document_separator=args.document_separator.replace("\\n", "\n").replace("\\t", "\t"),
    )
    started = time.monotonic()
    prepared = prepare(
        args.sources,
        args.out,
        settings,
        workers=args.workers,
        force=args.force,
        progress=show_progress(sys.stderr),
    )
    for line in summary(prepared, args, time.monotonic() - started):
        print(line)


def summary(prepared: Prepared, args: argparse.Namespace, seconds: float) -> list[str]:
    """The lines that say what the set holds and what was left out."""
    manifest = prepared.manifest
    counts = manifest.counts
    verb = {
        "written": f"prepared in {seconds:.1f} s",
        "resumed": f"finished the interrupted work in {seconds:.1f} s",
        "unchanged": "already finished, nothing to do",
    }[prepared.outcome]
    lines = [f"{args.out}: {verb}; {counts['documents']:,} documents of {counts['files']:,} files"]
    for split, shards in manifest.splits.items():
        tokens, size = manifest.total(split, "tokens"), manifest.total(split, "bytes")
        density = f", {size / tokens:.2f} bytes per token" if tokens else ""
        lines.append(
            f"  {split + ':':<12}{manifest.total(split, 'documents'):,} documents, "
            f"{tokens:,} tokens, {_megabytes(size)}{density}, {len(shards)} shards"
        )
    lines.append(
        f"  tokenizer:  {manifest.vocab_size:,} entries; {manifest.eos_token} "
        f"(id {manifest.eos_id}) ends each document"
    )
    if args.vocab_size is not None and manifest.vocab_size < args.vocab_size:
        lines.append(f"  note:       the texts give no more than that of {args.vocab_size:,}")
    if not manifest.byte_level:
        lines.append("  note:       this tokenizer does not give back every text byte for byte")
    lines += _exceptions(counts)
    for message in prepared.unreadable[:_SHOWN_NAMES]:
        lines.append(f"  unreadable: {message}")
    if len(prepared.unreadable) > _SHOWN_NAMES:
        lines.append(f"  unreadable: ... and {len(prepared.unreadable) - _SHOWN_NAMES:,} more")
    return lines


def _exceptions(counts: Mapping[str, int]) -> list[str]:
    lines = []
    left_out = [f"{counts[key]:,} {text}" for key, text in _LEFT_OUT.items() if counts.get(key)]
    if left_out:
        lines.append(f"  left out:   {', '.join(left_out)}")
    if counts.get("repaired"):
        lines.append(
            f"  repaired:   {counts['undecodable_bytes']:,} undecodable bytes in "
            f"{counts['repaired']:,} texts became U+FFFD"
        )
    if counts.get("cut"):
        lines.append(f"  cut:        {counts['cut']:,} texts longer than --max-document-bytes")
    if counts.get("duplicate_documents"):
        lines.append(
            f"  duplicates: {counts['duplicate_documents']:,} exact copies, "
            "each in the split of its original"
        )
    return lines


def show_progress(stream: TextIO) -> Any:
    """A bar on a terminal (if tqdm is installed), a line every few seconds elsewhere."""
    if stream.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return _Lines(stream)
        return _Bar(tqdm, stream)
    return _Lines(stream)


class _Bar:
    """A tqdm bar per stage: share, amount, MB/s, time left."""

    def __init__(self, tqdm: Any, stream: TextIO) -> None:
        self._tqdm = tqdm
        self._stream = stream
        self._bar: Any = None

    def begin(self, stage: str, total: int | None) -> None:
        if total is None:
            self._stream.write(f"{stage} ...\n")
            return
        self._bar = self._tqdm(
            total=total, desc=stage, unit="B", unit_scale=True, file=self._stream
        )

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines:
    """A line at the beginning of a stage and every few seconds, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = ""
        self._total = 0
        self._done = 0
        self._started = self._written = 0.0

    def begin(self, stage: str, total: int | None) -> None:
        self._stage, self._total, self._done = stage, total or 0, 0
        self._started = self._written = time.monotonic()
        amount = f" {_megabytes(total)}" if total else ""
        self._write(f"{stage}{amount}")

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._written < _LINE_SECONDS or not self._total:
            return
        self._written = now
        rate = self._done / (now - self._started)
        left = max(0, self._total - self._done) / rate if rate else 0.0
        self._write(
            f"{self._stage}: {min(1, self._done / self._total):.0%}, "
            f"{_megabytes(self._done)} of {_megabytes(self._total)}, "
            f"{rate / 1e6:.2f} MB/s, {_duration(left)} left"
        )

    def end(self) -> None:
        pass

    def _write(self, text: str) -> None:
        self._stream.write(f"prepare: {text}\n")
        self._stream.flush()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
