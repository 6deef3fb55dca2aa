"""Sliding perplexity: equal to a direct computation, each token once, resumed when killed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from sambay.data.shards import TokenDataset
from sambay.errors import ConfigError, DataError
from sambay.evals.result import RESULT
from sambay.evals.suites.perplexity import PerplexitySuite
from sambay.evals.tasks.windows import bucket, pieces, ratio
from tests.data import corpus
from tests.evals.harness_models import BreakingOff, Stopped, engine_backend, tiny_language_model
from tests.evals.harness_models import tokenizer as the_tokenizer

LENGTH, STRIDE = 90, 35
TEXTS = (
    "one two three four five six. " * 30,
    "The sky is blue. Here we go. " * 8,
    "Question: which bird sings?",
)


def write_texts(folder: Path, texts: Sequence[str] = TEXTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return folder


def nats_directly(text: str, length: int, stride: int) -> list[float]:
    """The loss of every token: plain forwards over whole windows, of which the new tokens count."""
    ids, model = the_tokenizer().encode(text), tiny_language_model()
    prefix, found = the_tokenizer().eos_id, []
    for end in range(length, max(length, len(ids) + stride - 1) + 1, stride):
        window = ids[end - length : end]
        # Where all of it is new there is nothing but the prefix to lead up to it.
        new = window if end == length else window[length - stride :]
        read = [prefix, *window] if len(new) == len(window) else window
        with torch.no_grad():
            logprobs = model(torch.tensor([read[:-1]]))[0].log_softmax(-1)
        places = range(len(read) - len(new), len(read))
        found += [-float(logprobs[place - 1, read[place]]) for place in places]
    return found


@pytest.mark.parametrize("stride", [STRIDE, LENGTH])
def test_numbers_equal_a_direct_computation(stride: int, tmp_path: Path) -> None:
    backend = BreakingOff(engine_backend())
    suite = PerplexitySuite(write_texts(tmp_path / "texts"), LENGTH, stride)
    result = suite.evaluate(backend, tmp_path / "out")
    direct = [nats_directly(text, LENGTH, stride) for text in TEXTS]
    tokens = [len(parts) for parts in direct]
    assert tokens[0] > 3 * LENGTH > 2 * tokens[1] > LENGTH > tokens[2]
    for document, parts, text in zip(result.details["documents"], direct, TEXTS, strict=True):
        assert document["nats"] == pytest.approx(sum(parts), abs=1e-3)
        assert (document["tokens"], document["bytes"]) == (len(parts), len(text))
    total = sum(map(sum, direct))
    metrics = result.metrics
    assert metrics[f"loss@{LENGTH}"].value == pytest.approx(total / sum(tokens), abs=1e-5)
    assert metrics[f"perplexity@{LENGTH}"].value == pytest.approx(
        math.exp(total / sum(tokens)), rel=1e-5
    )
    assert metrics[f"bits_per_byte@{LENGTH}"].value == pytest.approx(
        total / math.log(2) / sum(map(len, TEXTS)), rel=1e-5
    )
    assert {metric.count for metric in metrics.values()} == {3}
    for place in result.details["positions"]:
        inside = [parts[place["from"] : place["to"]] for parts in direct]
        inside = [parts for parts in inside if parts]
        assert place["tokens"] == sum(map(len, inside))
        assert place["documents"] == len(inside)
        assert place["loss"] == pytest.approx(sum(map(sum, inside)) / place["tokens"], abs=1e-5)
    assert [place["to"] for place in result.details["positions"]] == [64, 128, 256, 512]


def test_a_stride_of_the_length_makes_disjoint_windows(tmp_path: Path) -> None:
    backend = BreakingOff(engine_backend())
    PerplexitySuite(write_texts(tmp_path / "texts"), LENGTH, LENGTH).evaluate(
        backend, tmp_path / "out"
    )
    prefix = backend.prefix_id
    wholes = set()
    for text in TEXTS:
        ids = backend.encode(text)
        wholes |= {tuple(ids[start : start + LENGTH]) for start in range(0, len(ids), LENGTH)}
    for passage in backend.passages:
        assert passage.context[0] == prefix
        window = (*passage.context[1:], *passage.continuation)
        assert any(whole[: len(window)] == window for whole in wholes)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 100, 101, 135, 136, 700])
@pytest.mark.parametrize(("length", "stride"), [(100, 100), (100, 35), (100, 1), (40, 7), (2, 1)])
def test_every_token_is_scored_once_behind_enough_others(
    count: int, length: int, stride: int
) -> None:
    found = pieces(count, length, stride)
    assert [place for one in found for place in range(one.start, one.end)] == list(range(count))
    for one in found:
        low, high = bucket(one.start)
        assert low <= one.start < one.end <= high
        assert one.end - one.begin <= length
        if one.begin > 0:
            assert one.start - one.begin >= length - stride
        else:
            assert one.end <= length
        passage = one.passage(list(range(1, count + 1)), 0)
        assert (passage.context[0] == 0) is (one.begin == 0 or length == stride)
        assert passage.context
    assert min(one.end for one in found) == min(count, length, 64)


def test_standard_errors(tmp_path: Path) -> None:
    """Of a ratio: those of a mean where all parts weigh the same; scaled where one is alone."""
    values = [3.0, 5.0, 10.0]
    value, stderr = ratio([(one, 1.0) for one in values])
    deviation = math.sqrt(sum((one - 6) ** 2 for one in values) / 2)
    assert (value, stderr) == (6.0, pytest.approx(deviation / math.sqrt(3)))
    assert ratio([(2.0, 4.0)]) == (0.5, None)
    assert ratio([(2.0, 4.0), (1.0, 2.0)]) == (0.5, 0.0)
    result = PerplexitySuite(write_texts(tmp_path / "texts", TEXTS[:1]), LENGTH, STRIDE).evaluate(
        engine_backend(), tmp_path / "out"
    )
    assert result.details["errors_over"] == "pieces"
    loss, perplexity, bits = (
        result.metrics[f"{name}@{LENGTH}"] for name in ("loss", "perplexity", "bits_per_byte")
    )
    assert loss.stderr is not None
    assert perplexity.stderr == pytest.approx(loss.stderr * perplexity.value)
    assert bits.stderr == pytest.approx(loss.stderr * bits.value / loss.value)
    assert loss.count == len(pieces(len(the_tokenizer().encode(TEXTS[0])), LENGTH, STRIDE))


def test_a_killed_evaluation_goes_on_and_writes_the_same_bytes(tmp_path: Path) -> None:
    suite = PerplexitySuite(write_texts(tmp_path / "texts"), LENGTH, STRIDE)
    whole = BreakingOff(engine_backend())
    suite.evaluate(whole, tmp_path / "whole")
    for most in (1, 4):
        with pytest.raises(Stopped):
            suite.evaluate(BreakingOff(engine_backend(), most), tmp_path / "parts")
    told: list[tuple[int, int, str]] = []
    last = BreakingOff(engine_backend())
    suite.evaluate(last, tmp_path / "parts", on_progress=lambda *seen: told.append(seen))
    assert len(last.passages) == len(whole.passages) - 5
    assert (told[0][:2], told[-1][:2]) == ((5, len(whole.passages)), (len(whole.passages),) * 2)
    parts, complete = ((tmp_path / name / RESULT).read_bytes() for name in ("parts", "whole"))
    assert parts == complete
    (tmp_path / "texts" / "2.txt").write_text("another one")
    with pytest.raises(ConfigError, match="holds another evaluation: items_sha256"):
        suite.evaluate(whole, tmp_path / "whole")


def test_few_windows_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sambay.evals.suites.perplexity._TOKENS_AT_ONCE", 2 * LENGTH)
    backend = BreakingOff(engine_backend())
    inner, sizes = backend.score, []

    def score(passages: Any, on_score: Any) -> None:
        sizes.append(len(passages))
        inner(passages, on_score)

    backend.score = score
    suite = PerplexitySuite(write_texts(tmp_path / "texts"), LENGTH, STRIDE)
    result = suite.evaluate(backend, tmp_path / "grouped")
    assert max(sizes) <= 5
    assert sum(sizes) == len(backend.passages)
    monkeypatch.undo()
    assert suite.evaluate(engine_backend(), tmp_path / "whole") == result


def test_every_kind_of_source(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    losses = []
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    for text, options in ((folder, {}), (lines, {"text_field": "body"})):
        suite = PerplexitySuite(text, LENGTH, STRIDE, **options)
        result = suite.evaluate(engine_backend(), tmp_path / f"out-{text.stem}")
        losses.append(result.metrics)
    assert losses[0] == losses[1]
    short = PerplexitySuite(folder, LENGTH, min_tokens=LENGTH).documents(
        engine_backend(), tmp_path / "out"
    )
    assert [document.num_bytes for document in short] == [len(text) for text in TEXTS[:2]]
    first = PerplexitySuite(lines, LENGTH, limit=1, text_field="body")
    assert len(first.documents(engine_backend(), tmp_path / "out")) == 1


def test_the_validation_split_of_a_prepared_set(tmp_path: Path) -> None:
    the_tokenizer().save(tmp_path / "tokenizer")
    corpus.write_texts(tmp_path / "corpus", 30)
    folder = tmp_path / "set"
    corpus.make(tmp_path / "corpus", folder, tokenizer=str(tmp_path / "tokenizer"))
    split = TokenDataset.open(folder, "validation")
    assert split.num_documents > 3
    suite = PerplexitySuite(folder, 60)
    documents = suite.documents(engine_backend(), tmp_path / "out")
    assert [document.tokens for document in documents] == [
        split.document(number)[:-1].tolist() for number in range(split.num_documents)
    ]
    assert sum(document.num_bytes for document in documents) == split.text_bytes


def test_the_picture_shows_the_loss_by_position(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    suite = PerplexitySuite(write_texts(tmp_path / "texts"), LENGTH, STRIDE)
    result = suite.evaluate(engine_backend(), tmp_path / "out")
    figure = suite.pictures(result)["position"]
    (line,) = [one for one in figure.axes[0].lines if len(one.get_xdata()) > 1]  # pyright: ignore
    positions = result.details["positions"]
    assert list(line.get_xdata()) == [place["to"] for place in positions]  # pyright: ignore
    assert list(line.get_ydata()) == [place["loss"] for place in positions]  # pyright: ignore


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 1}, "length = 1; it must be a whole number of at least 2"),
        ({"stride": 0}, "stride = 0"),
        ({"length": 10, "stride": 11}, "stride = 11 is more than length = 10"),
        ({"min_tokens": 0}, "min_tokens = 0"),
        ({"limit": 0}, "limit = 0"),
    ],
)
def test_settings_that_cannot_work(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        PerplexitySuite(tmp_path, **fields)


def test_mistakes_are_told_before_anything_is_scored(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    backend = BreakingOff(engine_backend(LENGTH))
    for suite, message in (
        (PerplexitySuite(folder, LENGTH), f"length = {LENGTH} needs a context of {LENGTH + 1}.*89"),
        (PerplexitySuite(folder, 80, min_tokens=9999), "min_tokens = 9999: no document"),
    ):
        with pytest.raises(ConfigError, match=message):
            suite.evaluate(backend, tmp_path / "out")
    with pytest.raises(DataError, match=r"none: .*check the path"):
        PerplexitySuite(tmp_path / "none").evaluate(backend, tmp_path / "out")
    blank = write_texts(tmp_path / "blank", ["\n", " "])
    with pytest.raises(DataError, match=r"blank holds no text; .* a field 'text'"):
        PerplexitySuite(blank).evaluate(backend, tmp_path / "out")
    assert backend.passages == []
    assert not (tmp_path / "out").exists()
    result = PerplexitySuite(folder, LENGTH - 1).evaluate(backend, tmp_path / "out")
    assert f"perplexity@{LENGTH - 1}" in result.metrics
