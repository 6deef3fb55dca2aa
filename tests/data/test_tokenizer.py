from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sambay.data import tokenizer as module
from sambay.data.stream_decoder import StreamDecoder
from sambay.data.tokenizer import END_OF_TEXT, Tokenizer, cut_for_encoding
from sambay.errors import DataError
from tests.data.corpus import WORDS

SAMPLE = ["It's the model's state; they'll x = 1\n    return 42  # déjà\n\n\nnext 日本 🙂🙂"] * 3


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train([*SAMPLE, *WORDS], 350)


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """A tokenizer of another family: words with a marked blank, unknown characters as bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Metaspace(),
            tokenizers.decoders.Fuse(),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "</s>", *byte_tokens], show_progress=False
    )
    inner.train_from_iterator(["the state of the gate and the memory"], trainer)
    content = json.loads(inner.to_str())
    for token in content["added_tokens"][2:]:
        token["special"] = False
    content["added_tokens"] = content["added_tokens"][:2]
    return Tokenizer(json.dumps(content), "</s>")


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ASCII_TEXT = st.text(st.characters(max_codepoint=127), max_size=60)
TRICKY = st.lists(
    st.sampled_from(
        [*"'sdtml \n\r\t\v\f\x1c\x1f\x85a1_!", "'re", "'LL", "  ", "é", "²", END_OF_TEXT]
    )
).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.one_of(ANY_TEXT, ASCII_TEXT, TRICKY))
@example("")
@example("\0")
@example("a" * 200 + " " * 200 + "\n" * 200)
@example(END_OF_TEXT * 2)
@example("\ufffd")
def test_any_text_survives_and_the_fast_path_equals_the_library(
    trained: Tokenizer, text: str
) -> None:
    ids = trained.encode(text)
    assert ids == trained.encode_slowly(text)
    assert trained.decode(ids) == text
    assert trained.decode_bytes(ids) == text.encode()
    assert trained.count_bytes(trained.encode_array(text)) == len(text.encode())
    assert trained.eos_id not in ids
    assert trained.decode(ids) == tokenizers.Tokenizer.from_str(trained.definition).decode(ids)


@settings(deadline=None, max_examples=150)
@given(st.one_of(ANY_TEXT, TRICKY), st.integers(1, 6))
def test_pieces_of_long_texts_give_the_tokens_of_the_whole(
    trained: Tokenizer, text: str, size: int
) -> None:
    text = text + "\nx" + text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", size)
        assert trained.encode(text) == trained.encode_slowly(text)
    assert "".join(cut_for_encoding(text, size)) == text


def test_texts_without_a_place_to_cut_still_survive(
    trained: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 10)
    monkeypatch.setattr(module, "_LARGEST_PIECE", 25)
    text = "é" * 90 + " " * 60 + "a" * 90
    assert max(len(piece) for piece in cut_for_encoding(text, 10)) == 25
    assert trained.decode(trained.encode(text)) == text


def test_remembered_words_stay_bounded(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORDS_KEPT", 3)
    fresh = Tokenizer(trained.definition, END_OF_TEXT)
    text = " ".join(f"w{n} {'y' * 100}" for n in range(9))
    assert fresh.encode(text) == trained.encode_slowly(text)
    assert len(fresh._words) <= 3


def test_the_trained_end_is_id_0_and_never_comes_from_text(trained: Tokenizer) -> None:
    assert (trained.eos_token, trained.eos_id) == (END_OF_TEXT, 0)
    text = f"before{END_OF_TEXT}after"
    assert 0 not in trained.encode(text)
    assert trained.encode(text, special_tokens=True).count(0) == 1
    assert 0 not in trained.encode(text)
    assert trained.decode([*trained.encode("a b"), 0]) == "a b"


def test_no_special_token_comes_from_text(trained: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained.definition)
    inner.add_special_tokens(["<|user|>"])
    chat = Tokenizer(inner.to_str(), END_OF_TEXT)
    number = chat.vocab_size - 1
    assert number not in chat.encode("é <|user|> a<|user|>")
    assert chat.decode(chat.encode("é <|user|> a<|user|>")) == "é <|user|> a<|user|>"
    assert chat.encode("<|user|>", special_tokens=True) == [number]


def test_an_end_not_marked_special_is_hidden_too(trained: Tokenizer) -> None:
    content = json.loads(trained.definition)
    content["added_tokens"][0]["special"] = False
    plain = Tokenizer(json.dumps(content), END_OF_TEXT)
    text = f"{END_OF_TEXT}a\0b{END_OF_TEXT}{END_OF_TEXT}c"
    ids = plain.encode(text)
    assert plain.eos_id not in ids
    assert plain.decode(ids) == text
    content["added_tokens"].append({**content["added_tokens"][0], "id": 350, "content": "§"})
    with pytest.raises(DataError, match="--eos-token"):
        Tokenizer(json.dumps(content), "§").encode("a § b")


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    texts = [" ".join(random.Random(n).choices(WORDS, k=50)) for n in range(40)]
    first = Tokenizer.train(texts, 400)
    random.Random(1).shuffle(texts)
    assert Tokenizer.train(texts, 400).definition == first.definition
    assert first.vocab_size <= 400


def test_saved_and_loaded_tokenizers_are_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert (loaded.sha256, loaded.eos_id) == (trained.sha256, trained.eos_id)
    assert (
        loaded.sha256
        == module.hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    )


def test_truncation_padding_and_dropout_of_a_file_do_not_act(trained: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained.definition)
    inner.enable_truncation(5)
    inner.enable_padding(length=50)
    inner.model.dropout = 0.9
    loaded = Tokenizer(inner.to_str(), END_OF_TEXT)
    text = SAMPLE[0] * 4
    assert loaded.encode(text) == trained.encode(text)
    assert loaded.encode("a é") == trained.encode("a é")
    assert loaded.sha256 == trained.sha256


def test_a_post_processor_adds_nothing_to_texts(trained: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained.definition)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    assert Tokenizer(inner.to_str(), END_OF_TEXT).encode("a b") == trained.encode("a b")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "é"}),
        ("tokenizer_config.json", {"eos_token": {"content": "é", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": "é"}),
    ],
)
def test_the_end_is_found_beside_the_file(
    trained: Tokenizer, tmp_path: Path, name: str, content: dict
) -> None:
    inner = tokenizers.Tokenizer.from_str(trained.definition)
    inner.add_special_tokens(["é"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).eos_token == "é"
    assert Tokenizer.load(tmp_path / "tokenizer.json", END_OF_TEXT).eos_token == END_OF_TEXT


def test_an_uncertain_end_must_be_named(trained: Tokenizer, tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(trained.definition)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).eos_token == END_OF_TEXT
    inner.add_special_tokens(["</s>", "<pad>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"--eos-token.*<\|endoftext\|>, </s>"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="'<eot>' is not in the tokenizer"):
        Tokenizer.load(tmp_path, "<eot>")


def test_tokenizers_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: No such file"):
        Tokenizer.load(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for content in (b"{", b"\xff\xfe", b'{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_refused(trained: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        trained.encode("a\ud800b")


def test_ids_outside_the_vocabulary_give_no_text(trained: Tokenizer) -> None:
    ids = trained.encode("ab")
    assert trained.decode([-1, *ids, trained.vocab_size, 10**9]) == "ab"


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(module.MissingPackage, match=r"sambay\[data\]"):
        Tokenizer.train(["x"], 300)


def test_other_families_decode_as_the_library_does(metaspace: Tokenizer) -> None:
    assert not metaspace.byte_level
    ids = metaspace.encode("the gate 🙂 memory")
    assert metaspace.decode(ids) == "the gate 🙂 memory"
    assert metaspace.count_bytes(metaspace.encode_array("the gate")) == len("the gate")


@settings(deadline=None, max_examples=150)
@given(st.one_of(ANY_TEXT, st.text("é日🙂👩‍👩‍👧a ", max_size=30)))
def test_streams_never_show_half_a_character(trained: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(trained)
    shown = ""
    for token in trained.encode(text):
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown + decoder.finish() == text


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 349), max_size=30))
def test_streams_of_any_tokens_equal_the_decoded_whole(trained: Tokenizer, ids: list[int]) -> None:
    decoder = StreamDecoder(trained)
    shown = "".join(decoder.push(token) for token in ids) + decoder.finish()
    assert shown == trained.decode(ids)


def test_an_unfinished_character_appears_at_the_end(trained: Tokenizer) -> None:
    decoder = StreamDecoder(trained)
    first = trained.token_bytes.index("🙂".encode()[:1])  # type: ignore[union-attr]
    assert (decoder.push(first), decoder.finish()) == ("", "\ufffd")


def test_streams_of_other_families_keep_blanks_and_characters(metaspace: Tokenizer) -> None:
    text = "the state 🙂 of 日本 the gate"
    decoder = StreamDecoder(metaspace)
    shown = ""
    for token in metaspace.encode(text):
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown + decoder.finish() == text


def test_what_is_kept_apart_is_never_joined() -> None:
    texts = ["call 1234567 or 1234567 now\n" * 20, "12 12 12 34 34 34 56 56"]
    tokenizer = Tokenizer.train(texts, 330, apart="[0-9]{1,2}")
    text = "call 1234567, and naïve 12\n"
    parts = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert [part for part in parts if part.isdigit()] == ["12", "34", "56", "7", "12"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.byte_level
    assert tokenizer.encode(text) == tokenizer.encode_slowly(text)
