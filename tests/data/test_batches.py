from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sambay.data.batches import IGNORE, evaluation_batches, num_windows, read_batch
from sambay.data.sampler import sample_indices
from sambay.data.shards import TokenDataset
from sambay.errors import DataError


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> TokenDataset:
    return TokenDataset.open(prepared, "train")


def test_labels_are_the_inputs_one_later_across_shards(dataset: TokenDataset) -> None:
    length = 61
    tokens = dataset.read(0, dataset.num_tokens).astype(np.int64)
    count = num_windows(dataset, length)
    assert count == (len(tokens) - 1) // length
    order = sample_indices(5, 0, count, count)
    batch = read_batch(dataset, order, length)
    assert batch.input_ids.shape == batch.labels.shape == (count, length)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.segments is None
    for row, index in enumerate(order.tolist()):
        window = torch.from_numpy(tokens[index * length : index * length + length + 1])
        assert torch.equal(batch.input_ids[row], window[:-1])
        assert torch.equal(batch.labels[row], window[1:])


def test_segments_number_the_documents_of_a_row(dataset: TokenDataset) -> None:
    batch = read_batch(dataset, range(num_windows(dataset, 500)), 500, segments=True)
    assert batch.segments is not None
    assert batch.segments.dtype == torch.int32
    assert batch.segments.max() > 0
    for ids, numbers in zip(batch.input_ids.tolist(), batch.segments.tolist(), strict=True):
        document = 0
        for token, number in zip(ids, numbers, strict=True):
            assert number == document
            document += token == dataset.eos_id


def test_no_label_crosses_the_end_of_a_document(dataset: TokenDataset) -> None:
    rows = range(num_windows(dataset, 61))
    joined, separate = (read_batch(dataset, rows, 61, segments=flag) for flag in (False, True))
    ends = separate.input_ids == dataset.eos_id
    assert torch.equal(joined.input_ids, separate.input_ids)
    assert ends.any()
    assert (separate.labels[ends] == IGNORE).all()
    assert torch.equal(separate.labels[~ends], joined.labels[~ends])
    # The end itself is learned: it is the label of the last token of text.
    assert (separate.labels == dataset.eos_id).any()


@pytest.mark.parametrize(("length", "rows"), [(64, 4), (61, 7), (1000, 3)])
@pytest.mark.parametrize("segments", [False, True])
def test_evaluation_sees_every_label_and_byte_once(
    dataset: TokenDataset, length: int, rows: int, segments: bool
) -> None:
    inputs, labels, total, counted, position = [], [], 0, 0, 0
    for batch in evaluation_batches(dataset, length, rows, segments=segments):
        assert batch.start == position
        assert (batch.segments is not None) == segments
        assert batch.num_labels == int((batch.labels != IGNORE).sum())
        position += batch.labels.numel()
        inputs += batch.input_ids.flatten().tolist()
        labels += batch.labels.flatten().tolist()
        total += batch.text_bytes
        counted += batch.num_labels
    tokens = dataset.read(0, dataset.num_tokens).tolist()
    assert inputs == tokens[:-1]
    firsts = [0, *(number + 1 for number, one in enumerate(tokens[:-1]) if one == dataset.eos_id)]
    left_out = firsts if segments else firsts[:1]
    expected = list(tokens)
    for number in left_out:
        expected[number] = IGNORE
    assert labels == expected[1:]
    assert counted == dataset.num_tokens - len(left_out)
    assert total == dataset.text_bytes - sum(dataset.count_bytes(one, 1) for one in left_out)


def test_evaluation_can_stop_early(dataset: TokenDataset) -> None:
    batches = list(evaluation_batches(dataset, 50, 4, max_windows=6))
    assert [batch.input_ids.shape for batch in batches] == [(4, 50), (2, 50)]
    whole = list(evaluation_batches(dataset, 50, 4))
    assert len(list(evaluation_batches(dataset, 50, 4, max_windows=10**9))) == len(whole)


def test_evaluation_of_less_than_a_window_is_one_short_row(dataset: TokenDataset) -> None:
    (batch,) = evaluation_batches(dataset, 10**6, 2)
    assert batch.input_ids.shape == (1, dataset.num_tokens - 1)


def test_too_little_data_for_a_window_is_an_error(dataset: TokenDataset) -> None:
    with pytest.raises(DataError, match="too few for sequence_length"):
        num_windows(dataset, dataset.num_tokens)
    assert num_windows(dataset, dataset.num_tokens - 1) == 1
    with pytest.raises(DataError, match="at least 1"):
        num_windows(dataset, 0)
