"""Which rows a step reads: the same for any division of the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sambay.data.batch_source import BatchSource
from sambay.data.batches import Batch, num_windows, read_batch
from sambay.data.sampler import sample_indices
from sambay.data.shards import TokenDataset
from sambay.errors import ConfigError, DataError
from tests.data.corpus import make, write_texts

LENGTH, ROWS, SEED = 40, 8, 3


@pytest.fixture(scope="module")
def sets(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Three sets of one tokenizer and unequal sizes."""
    folders = [prepared]
    for number, count in enumerate((9, 23), start=1):
        folder = tmp_path_factory.mktemp(f"set{number}")
        texts = write_texts(folder / "texts", count, seed=number)
        make(texts, folder / "data", tokenizer=str(prepared))
        folders.append(folder / "data")
    return [TokenDataset.open(folder, "train") for folder in folders]


def source_of(sets: list[TokenDataset], weights: list[float], **fields: Any) -> BatchSource:
    names = [f"set{number}" for number in range(len(sets))]
    settings = {"sequence_length": LENGTH, "global_batch_size": ROWS, "seed": SEED, **fields}
    return BatchSource(sets, names=names, weights=weights, **settings)


def assert_equal(a: Batch, b: Batch) -> None:
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.labels, b.labels)
    assert (a.segments is None) == (b.segments is None)
    if a.segments is not None and b.segments is not None:
        assert torch.equal(a.segments, b.segments)


def joined(parts: list[Batch]) -> Batch:
    segments = [part.segments for part in parts if part.segments is not None]
    return Batch(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat(segments) if segments else None,
    )


@pytest.mark.parametrize("segments", [False, True])
def test_one_set_gives_the_batches_it_always_gave(sets: list[TokenDataset], segments: bool) -> None:
    source = source_of(sets[:1], [1.0], separate_documents=segments)
    samples = num_windows(sets[0], LENGTH)
    for step in (0, 1, 17, 10**9):
        indices = sample_indices(SEED, step, ROWS, samples)
        assert_equal(source.batch(step), read_batch(sets[0], indices, LENGTH, segments=segments))


@pytest.mark.parametrize("options", [{}, {"separate_documents": True}, {"whole_documents": True}])
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_ranks_and_micro_batches_read_the_same_rows(
    sets: list[TokenDataset], options: dict[str, bool], ranks: int, micro_batch: int
) -> None:
    source = source_of(sets, [0.5, 0.2, 0.3], **options)
    for step in (0, 5):
        parts = []
        own = ROWS // ranks
        for rank in range(ranks):
            for start in range(rank * own, (rank + 1) * own, micro_batch):
                rows = slice(start, min(start + micro_batch, (rank + 1) * own))
                parts.append(source.batch(step, rows))
        assert_equal(joined(parts), source.batch(step))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_run_that_changes_its_number_of_processes_reads_on(
    sets: list[TokenDataset], data: st.DataObject
) -> None:
    """Each life of the run opens the sets anew and has its own number of ranks."""
    weights = [0.5, 0.2, 0.3]
    undisturbed = source_of(sets, weights)
    step = data.draw(st.integers(0, 10**6))
    for _ in range(3):
        ranks = data.draw(st.sampled_from([1, 2, 4, 8]))
        life = source_of(sets, weights)
        for _ in range(data.draw(st.integers(1, 3))):
            rows = [slice(n * ROWS // ranks, (n + 1) * ROWS // ranks) for n in range(ranks)]
            found = [life.sample_indices(step, own) for own in rows]
            sources, samples = undisturbed.sample_indices(step)
            assert np.concatenate([one for one, _ in found]).tolist() == sources.tolist()
            assert np.concatenate([one for _, one in found]).tolist() == samples.tolist()
            step += 1


@pytest.mark.parametrize("options", [{}, {"whole_documents": True}])
def test_an_epoch_of_each_source_has_every_row_once(
    sets: list[TokenDataset], options: dict[str, bool]
) -> None:
    source = source_of(sets, [0.6, 0.15, 0.25], **options)
    read: list[list[int]] = [[], [], []]
    for step in range(400):
        for number, sample in zip(
            *map(np.ndarray.tolist, source.sample_indices(step)), strict=True
        ):
            read[number].append(sample)
    for own, size in zip(read, source.num_rows, strict=True):
        epochs = [own[start : start + size] for start in range(0, len(own), size)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]


def test_sources_of_one_size_have_their_own_order(sets: list[TokenDataset]) -> None:
    source = source_of([sets[0], sets[0]], [0.5, 0.5])
    found = [source.sample_indices(step) for step in range(10)]
    orders = [[int(s) for n, one in found for m, s in zip(n, one, strict=True) if m == k]
              for k in (0, 1)]  # fmt: skip
    assert orders[0] != orders[1]


def test_realised_shares_are_within_a_row_of_the_weights(sets: list[TokenDataset]) -> None:
    weights = [0.61, 0.09, 0.3]
    source = source_of(sets, weights)
    for step in range(60):
        shares = source.shares(step)
        rows = step * ROWS
        found = np.zeros(3, np.int64)
        for earlier in range(step):
            found += np.bincount(source.sample_indices(earlier)[0], minlength=3)
        for share, weight, count in zip(shares.values(), weights, found.tolist(), strict=True):
            assert share.tokens == count * LENGTH
            assert abs(count - rows * weight) < 1
            assert share.share == pytest.approx(count / max(rows, 1))
    assert list(source.shares(1)) == ["set0", "set1", "set2"]
    share = source.shares(60)["set1"]
    assert share.epochs == pytest.approx(share.tokens / LENGTH / source.num_rows[1])


def test_rows_come_from_the_source_they_are_assigned_to(sets: list[TokenDataset]) -> None:
    source = source_of(sets, [0.5, 0.2, 0.3])
    for step in range(4):
        sources, samples = source.sample_indices(step)
        batch = source.batch(step)
        for row, (number, sample) in enumerate(
            zip(sources.tolist(), samples.tolist(), strict=True)
        ):
            window = sets[number].read(sample * LENGTH, LENGTH + 1).astype(np.int64)
            assert batch.input_ids[row].tolist() == window[:-1].tolist()
            assert batch.labels[row].tolist() == window[1:].tolist()


def test_what_cannot_be_read_is_refused(sets: list[TokenDataset]) -> None:
    with pytest.raises(ConfigError, match=r"sum to 0\.9"):
        source_of(sets, [0.5, 0.2, 0.2])
    with pytest.raises(DataError, match="too few for sequence_length"):
        source_of(sets, [0.5, 0.2, 0.3], sequence_length=10**6)
    with pytest.raises(DataError, match="step is -1"):
        source_of(sets, [0.5, 0.2, 0.3]).batch(-1)


def test_the_fingerprint_names_all_sets_in_order(sets: list[TokenDataset]) -> None:
    hashes = [one.manifest_hash for one in sets]
    assert len(set(hashes)) == 3
    assert source_of(sets, [0.5, 0.2, 0.3]).manifest_hash.split(",") == hashes
    assert source_of(sets[:1], [1.0]).manifest_hash == hashes[0]
