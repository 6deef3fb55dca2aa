"""From sources to a finished set: list, scan, tokenizer, plan, shards, move."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sambay.data.journal import Journal
from sambay.data.manifest import MANIFEST_FILE, SPLITS, Manifest, Shard
from sambay.data.plan import Plan, check_splits, describe_sources, make_plan
from sambay.data.scan import Scan, scan
from sambay.data.settings import PrepareSettings
from sambay.data.sources import Listing, list_files
from sambay.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sambay.data.units import UnitContext, UnitTask, dtype_name, write_unit
from sambay.data.workers import default_workers, run_tasks
from sambay.errors import ConfigError, DataError

# The sample a tokenizer is trained on grows with the vocabulary, so that rare merges are seen.
_SMALLEST_SAMPLE = 32 << 20
_SAMPLE_PER_ENTRY = 1 << 10
_SAMPLE_FOR_ESTIMATES = 1 << 20
# Below this much input, starting processes costs more than they save.
_WORTH_SCANNING = 64 << 20
_WORTH_WRITING = 4 << 20


class Progress(Protocol):
    """Where the stages of a run are reported."""

    def begin(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` in bytes, or None if it has no measure."""

    def advance(self, count: int) -> None:
        """That many bytes more are done."""

    def end(self) -> None:
        """The stage has ended, well or not."""


class Silent:
    """Progress that nobody sees."""

    def begin(self, stage: str, total: int | None) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Prepared:
    """The result: the manifest, what could not be read (messages), and how it came about.

    outcome: "written", "resumed" (part of it was there from an earlier run), or "unchanged" (the
    folder already held exactly this set).
    """

    manifest: Manifest
    unreadable: tuple[str, ...]
    outcome: str


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    settings: PrepareSettings,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Write the set for `sources` into the folder `out`, or finish one that was interrupted.

    The content depends on the sources and settings only: not on `workers` (None: as many as there
    are processors, for large inputs), not on the order of sources or of names in folders.
    `force` replaces a finished set, and unfinished work that does not fit. With more than one
    worker, a script that calls this must be importable (`if __name__ == "__main__":`).

    Raises:
        ConfigError, DataError: see the functions it is made of; nothing finished is touched.
        WriteFailed: the disk is full or refuses; the next run continues.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1")
    if not sources:
        raise ConfigError("no SOURCE given; name files or folders to prepare")
    run = _Run(Path(out).absolute(), settings, workers, progress or Silent())
    listing = list_files(
        [Path(source) for source in sources],
        include=settings.include,
        exclude=settings.exclude,
        out=run.out,
    )
    given = None
    if settings.tokenizer is not None:
        given = Tokenizer.load(settings.tokenizer, settings.eos_token)
    run.check_out()
    if (run.out / MANIFEST_FILE).exists() and not force:
        return run.confirm_finished(listing, given)
    plan = run.unfinished(listing, given, force)
    if plan is not None:
        with run.journal.locked():
            run.check_undisturbed(plan, force)
            return run.write(plan, resumed=True)
    scanned = run.scan(listing)
    check_splits(scanned, settings.validation_fraction)
    tokenizer = given or run.train(scanned)
    plan = make_plan(listing, scanned, settings, tokenizer)
    with run.journal.locked():
        run.check_undisturbed(None, force)
        run.journal.discard()
        tokenizer.save(run.journal.folder)
        run.journal.begin(plan)
        return run.write(plan, resumed=False)


class _Run:
    """One call of `prepare`."""

    def __init__(
        self, out: Path, settings: PrepareSettings, workers: int | None, progress: Progress
    ) -> None:
        self.out = out
        self.settings = settings
        self.journal = Journal(out)
        self._workers = workers
        self._progress = progress

    def check_out(self) -> None:
        """Refuse to mix a set with files that are not one's own."""
        if self.out.exists() and not self.out.is_dir():
            raise DataError(f"--out {self.out} is not a folder; choose another name")
        if (self.out / MANIFEST_FILE).exists() or self.journal.folder.exists():
            return
        for name in (*SPLITS, TOKENIZER_FILE):
            if (self.out / name).exists():
                raise DataError(
                    f"--out {self.out} holds {name}, which sambay prepare did not write; "
                    "choose another folder or move it away"
                )

    def confirm_finished(self, listing: Listing, given: Tokenizer | None) -> Prepared:
        """The finished set in the folder, if it is what this command would write.

        Raises:
            DataError: it was made from something else (names the first difference).
        """
        manifest = Manifest.read(self.out)
        difference = self._differing_setting(manifest.settings, given, manifest.tokenizer_sha256)
        unreadable: tuple[str, ...] = ()
        if not difference:
            scanned = self.scan(listing)
            unreadable = scanned.unreadable
            if describe_sources(listing, scanned) != manifest.sources:
                difference = "the sources have changed"
        if difference:
            raise DataError(
                f"{self.out} holds a finished set made differently ({difference}); "
                "choose another --out, or replace it with --force"
            )
        if self.journal.folder.exists():
            # A kill after the last step of the move leaves its journal, and so does one that
            # interrupts a replacement; other work is left alone.
            with self.journal.locked():
                plan = self.journal.read_plan()
                if plan and not self._difference(plan, listing, given):
                    self.journal.forget()
        return Prepared(manifest, unreadable, "unchanged")

    def unfinished(self, listing: Listing, given: Tokenizer | None, force: bool) -> Plan | None:
        """The plan of unfinished work if this command may continue it.

        Raises:
            DataError: there is work that does not fit, and `force` is not set.
        """
        try:
            plan = self.journal.read_plan()
            difference = plan and self._difference(plan, listing, given)
        except DataError:
            if not force:
                raise
            return None
        if difference and not force:
            raise DataError(
                f"{self.out} holds unfinished work that does not fit ({difference}); "
                "repeat the earlier command to finish it, or start over with --force"
            )
        return None if difference else plan

    def check_undisturbed(self, plan: Plan | None, force: bool) -> None:
        """Notice, once the folder is locked, what another process did there before that.

        Raises:
            DataError: the folder is not in the state this run has seen.
        """
        finished = (self.out / MANIFEST_FILE).exists() and not force
        if finished or (plan and self.journal.read_plan() != plan):
            raise DataError(
                f"another sambay prepare has just changed {self.out}; run the command again"
            )

    def scan(self, listing: Listing) -> Scan:
        """The documents, and a sample large enough for the tokenizer."""
        sample = _SAMPLE_FOR_ESTIMATES
        if self.settings.vocab_size is not None:
            sample = max(_SMALLEST_SAMPLE, self.settings.vocab_size * _SAMPLE_PER_ENTRY)
        workers = self._count_workers(listing.size, _WORTH_SCANNING)
        self._progress.begin("reading", listing.size)
        try:
            return scan(
                listing,
                self.settings.reading,
                self.settings.validation_fraction,
                sample,
                workers,
                self._progress.advance,
            )
        finally:
            self._progress.end()

    def train(self, scanned: Scan) -> Tokenizer:
        """A tokenizer trained on the sample, which holds training documents only."""
        assert self.settings.vocab_size is not None
        self._progress.begin("training the tokenizer", None)
        try:
            return Tokenizer.train(scanned.sample, self.settings.vocab_size)
        finally:
            self._progress.end()

    def write(self, plan: Plan, resumed: bool) -> Prepared:
        """Write the units that are missing and move everything into place."""
        if self.journal.moving():
            return Prepared(self.journal.install(None), plan.unreadable, "resumed")
        tokenizer = Tokenizer.load(self.journal.folder)
        if tokenizer.sha256 != plan.tokenizer_sha256:
            raise DataError(
                f"{self.journal.folder / TOKENIZER_FILE} has been changed; start over with --force"
            )
        results = self.journal.complete_units() if resumed else {}
        context = UnitContext(
            self.out,
            plan.files,
            self.settings.reading,
            self.settings.validation_fraction,
            tokenizer.eos_token,
            tokenizer.sha256,
        )
        tasks = [
            UnitTask(number, unit)
            for number, unit in enumerate(plan.units)
            if number not in results
        ]
        done = sum(part["shard"]["bytes"] for unit in results.values() for part in unit.values())
        workers = self._count_workers(plan.text_bytes, _WORTH_WRITING)
        self._progress.begin("tokenizing", plan.text_bytes - done)
        try:
            running = run_tasks(write_unit, context, tasks, workers, self._progress.advance)
            with contextlib.closing(running):
                for at, result in running:
                    results[tasks[at].number] = result
        finally:
            self._progress.end()
            self.journal.sweep()
        manifest = _manifest(plan, tokenizer, results)
        return Prepared(
            self.journal.install(manifest), plan.unreadable, "resumed" if resumed else "written"
        )

    def _difference(self, plan: Plan, listing: Listing, given: Tokenizer | None) -> str:
        return self._differing_setting(
            plan.settings, given, plan.tokenizer_sha256
        ) or _differing_file(plan, listing)

    def _differing_setting(
        self, earlier: dict[str, Any], given: Tokenizer | None, tokenizer_sha256: str
    ) -> str:
        # Through JSON, as the earlier ones went: tuples are lists there.
        now = json.loads(json.dumps(self.settings.record()))
        for key in sorted(now.keys() | earlier.keys()):
            if now.get(key) != earlier.get(key):
                return f"{key} was {earlier.get(key)!r}, now {now.get(key)!r}"
        if given is not None and given.sha256 != tokenizer_sha256:
            return "the tokenizer is another one"
        return ""

    def _count_workers(self, size: int, worth: int) -> int:
        if self._workers is not None:
            return self._workers
        return default_workers() if size >= worth else 1


def _differing_file(plan: Plan, listing: Listing) -> str:
    if plan.files == listing.files:
        return ""
    earlier = {file.path: file for file in plan.files}
    now = {file.path: file for file in listing.files}
    for path in sorted(earlier.keys() | now.keys()):
        if path not in now:
            return f"{path} is gone"
        if path not in earlier:
            return f"{path} is new"
        if earlier[path] != now[path]:
            return f"{path} has changed"
    return "the sources are grouped differently"


def _manifest(plan: Plan, tokenizer: Tokenizer, results: dict[int, dict[str, Any]]) -> Manifest:
    parts = {
        split: [unit[split] for _, unit in sorted(results.items()) if split in unit]
        for split in SPLITS
    }
    return Manifest(
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        eos_token=tokenizer.eos_token,
        dtype=dtype_name(tokenizer.vocab_size),
        tokenizer_sha256=tokenizer.sha256,
        byte_level=all(part["exact"] for split in SPLITS for part in parts[split]),
        settings=plan.settings,
        sources=plan.sources,
        counts=plan.counts,
        splits={split: tuple(Shard(**part["shard"]) for part in parts[split]) for split in SPLITS},
    )
