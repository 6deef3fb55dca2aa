"""Finding and reading the tokenizer of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from sambay.data.stream_decoder import StreamDecoder
from sambay.data.tokenizer import Tokenizer
from sambay.errors import DataError
from sambay.hf.tokenizer import (
    PHI4_TOKENS,
    context_limit,
    control_tokens,
    end_token_ids,
    find_tokenizer,
    load_tokenizer,
)
from tests.hf import gpt4o

OFFICIAL = {
    "model_type": "phi4flash",
    "auto_map": {
        "AutoConfig": "configuration_phi4flash.Phi4FlashConfig",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    "eos_token_id": 199999,
    "max_position_embeddings": 262144,
}


def put(file: Path, values: Any) -> None:
    file.write_text(values if isinstance(values, str) else json.dumps(values))


def test_the_file_in_the_folder_or_the_one_given(tmp_path: Path) -> None:
    mine = gpt4o.write(tmp_path / "model")
    other = gpt4o.write(tmp_path / "other")
    assert find_tokenizer(tmp_path / "model") == mine
    assert find_tokenizer(tmp_path / "model", tmp_path / "other") == other
    assert find_tokenizer(tmp_path / "model", other) == other
    renamed = other.rename(tmp_path / "gpt4o.json")
    assert find_tokenizer(tmp_path / "model", renamed) == renamed
    for wrong in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(DataError, match=r"--tokenizer .* give a tokenizer.json or a folder"):
            find_tokenizer(tmp_path / "model", wrong)


@pytest.mark.parametrize(
    "name", ["Xenova/gpt-4o", "Xenova/gpt-4o--tokenization.Fast", ["Xenova/gpt-4o", None]]
)
def test_a_tokenizer_named_only_remotely(name: object, tmp_path: Path) -> None:
    put(tmp_path / "config.json", OFFICIAL | {"auto_map": {"AutoTokenizer": name}})
    with pytest.raises(DataError) as caught:
        find_tokenizer(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("no tokenizer.json", "'Xenova/gpt-4o'", "download", "--tokenizer PATH"):
        assert part in message
    assert find_tokenizer(tmp_path, gpt4o.write(tmp_path / "here")).exists()


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    put(tmp_path / "config.json", {"model_type": "sambay"})
    with pytest.raises(DataError, match="copy the one that belongs to the model there"):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize("at_home", [True, False])
def test_control_tokens_behind_gaps_keep_their_numbers(at_home: bool, tmp_path: Path) -> None:
    """Listed in the vocabulary too, or not: then the library alone would renumber them."""
    file = gpt4o.write(tmp_path, gpt4o.definition(at_home=at_home))
    tokenizer = load_tokenizer(file, tmp_path)
    assert tokenizer.eos_id == 600
    assert tokenizer.vocab_size == 631
    assert {name: token.id for name, token in control_tokens(tokenizer).items()} == gpt4o.CONTROLS
    named = tokenizer.encode("a<|end|>b<|user|>", special_tokens=True)
    assert named[1::2] == [621, 622]
    for text in (gpt4o.TEXT, "x <|end|>\t\n  1234567 猫🐈 \r\n/ DON'T", "<|endoftext|>"):
        ids = tokenizer.encode(text)
        assert max(ids) < 320
        assert tokenizer.decode(ids) == text
        decoder = StreamDecoder(tokenizer)
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == text
    # Special tokens and numbers of gaps stand for no text.
    assert tokenizer.decode([600, 601, 621, 635, *tokenizer.encode("ok")]) == "ok"


def test_a_token_in_the_first_gap_keeps_its_number(tmp_path: Path) -> None:
    """The one not in the vocabulary has the very number that its size suggests."""
    values = gpt4o.definition({"<|endoftext|>": 600})
    number = len(values["model"]["vocab"])
    values["added_tokens"].append(values["added_tokens"][0] | {"id": number, "content": "<|x|>"})
    controls = control_tokens(load_tokenizer(gpt4o.write(tmp_path, values), tmp_path))
    assert {name: token.id for name, token in controls.items()} == {
        "<|endoftext|>": 600,
        "<|x|>": number,
    }


def test_control_tokens_and_their_white_space(tmp_path: Path) -> None:
    values = gpt4o.definition(rstrip=("<|end|>",))
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 631, "content": "    "})
    values["added_tokens"][-1]["special"] = False
    values["model"]["vocab"]["    "] = 631
    controls = control_tokens(load_tokenizer(gpt4o.write(tmp_path, values), tmp_path))
    assert controls.keys() == gpt4o.CONTROLS.keys()  # blanks are text, a marker is not
    assert [name for name, token in controls.items() if token.strips_right] == ["<|end|>"]


def test_the_plain_gpt4o_tokenizer_gets_the_other_control_tokens(tmp_path: Path) -> None:
    """The repository that the official config names lacks what the official chats need."""
    two = {name: PHI4_TOKENS[name] for name in ("<|endoftext|>", "<|endofprompt|>")}
    tokenizer = load_tokenizer(gpt4o.write(tmp_path, gpt4o.definition(two)), tmp_path)
    assert {n: t.id for n, t in control_tokens(tokenizer).items()} == PHI4_TOKENS
    assert tokenizer.vocab_size == 200029
    one = {"<|endoftext|>": 199999}
    tokenizer = load_tokenizer(gpt4o.write(tmp_path, gpt4o.definition(one)), tmp_path)
    assert control_tokens(tokenizer).keys() == one.keys()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [621, 600]}}, {621, 600}),
        ({"generation_config.json": {"eos_token_id": 621}}, {621}),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, {7}),
        ({"generation_config.json": {"eos_token_id": None}}, {600}),
        ({"config.json": {"eos_token_id": []}}, {600}),
        ({}, {600}),
    ],
)
def test_end_tokens(files: dict[str, Any], expected: set[int], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gpt4o.write(tmp_path), tmp_path)
    for name, values in files.items():
        put(tmp_path / name, values)
    assert end_token_ids(tmp_path, tokenizer) == expected


@pytest.mark.parametrize("value", ['"</s>"', "[1, true]", "-1", "1.5"])
def test_wrong_end_tokens(value: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gpt4o.write(tmp_path), tmp_path)
    put(tmp_path / "generation_config.json", f'{{"eos_token_id": {value}}}')
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id = "):
        end_token_ids(tmp_path, tokenizer)


def test_the_end_of_sequence_token_is_found(tmp_path: Path) -> None:
    controls = {"<|stop|>": 600, "<|done|>": 601}
    file = gpt4o.write(tmp_path / "t", gpt4o.definition(controls))
    put(tmp_path / "t" / "tokenizer_config.json", {"eos_token": {"content": "<|done|>"}})
    assert load_tokenizer(file, tmp_path).eos_id == 601
    (tmp_path / "t" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r'add "eos_token" to a tokenizer_config.json'):
        load_tokenizer(file, tmp_path)
    put(tmp_path / "config.json", {"eos_token_id": 600})
    assert load_tokenizer(file, tmp_path).eos_id == 600


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"added_tokens": [], "model": {}}', "\0"])
def test_damaged_tokenizers(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json|tokenizer folder"):
        load_tokenizer(tmp_path / "tokenizer.json", tmp_path)
    put(tmp_path / "config.json", "{")
    with pytest.raises(DataError, match=r"config.json cannot be read"):
        context_limit(tmp_path, tmp_path)


def test_an_ordinary_tokenizer_is_read_as_before(tmp_path: Path) -> None:
    Tokenizer.train(["some text\n"], 270).save(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", tmp_path)
    assert tokenizer.sha256 == Tokenizer.load(tmp_path).sha256
    assert tokenizer.eos_id == 0


@pytest.mark.parametrize(
    ("longest", "positions", "expected"),
    [(65536, 262144, 65536), (10**30, 262144, 262144), (None, None, None), (10**30, None, None)],
)
def test_context_limit(
    longest: int | None, positions: int | None, expected: int | None, tmp_path: Path
) -> None:
    put(tmp_path / "tokenizer_config.json", {"model_max_length": longest})
    put(tmp_path / "config.json", {"max_position_embeddings": positions})
    assert context_limit(tmp_path, tmp_path) == expected
