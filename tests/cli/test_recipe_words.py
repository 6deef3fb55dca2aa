"""Arguments of recipes on the command line: typed, checked, told apart from overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from sambay.cli.recipe_words import configured
from sambay.errors import ConfigError
from sambay.recipes.published import data_scaling, ladder
from sambay.spec import Parametrization


def test_arguments_and_overrides_in_any_order() -> None:
    name, config = configured("ladder", ["seed=7", "depth=8", "model.window=64"])
    assert name == "ladder-8"
    assert config.seed == 7
    assert config.model == ladder("sambay", 8).model.replace(window=64)
    name, config = configured("data_scaling", ["tokens=200e9", "parametrization=standard"])
    assert name == "data_scaling-200e9-standard"
    assert config == data_scaling("sambay", 200_000_000_000, Parametrization.STANDARD)
    assert configured("ladder", []) == ("ladder", ladder())


def test_arguments_of_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from sambay.recipes.demo import demo_sambay\n"
        "def seeded(number: int, folder='a'):\n"
        "    config = demo_sambay()\n"
        "    return replace(config, seed=number, data=config.data.replace(directory=folder))\n"
        "def strange(shape: dict):\n    return demo_sambay()\n"
    )
    name, config = configured(f"{file}:seeded", ["folder=b/c", "number=3"])
    assert (name, config.seed, config.data.directory) == ("seeded-3-b_c", 3, "b/c")
    with pytest.raises(ConfigError, match="needs number=VALUE"):
        configured(f"{file}:seeded", [])
    with pytest.raises(ConfigError, match="'shape' is declared as"):
        configured(f"{file}:strange", ["shape=1"])


def test_an_earlier_run_has_no_arguments(tmp_path: Path) -> None:
    from sambay.files import write_json

    write_json(tmp_path / "first" / "config.json", ladder("sambay", 8).to_dict())
    name, config = configured(str(tmp_path / "first"), ["seed=5"])
    assert (name, config.seed, config.model.num_layers) == ("first", 5, 8)
    with pytest.raises(ConfigError, match="unknown field 'depth'"):
        configured(str(tmp_path / "first"), ["depth=12"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpth=8"], "no argument 'dpth' .did you mean 'depth'"),
        (["depth=8", "depth=8"], "depth is given twice"),
        (["depth=eight"], "depth = 'eight'; it must be a whole number"),
        (["depth=6"], "depth = 6"),
        (["architecture=mambo"], "did you mean 'mambay'"),
        (["parametrization=mup+"], "parametrization = 'mup.'.*did you mean"),
        (["tokens=1"], "unknown field 'tokens'"),
        (["depth"], "not an override"),
        (["sed=3"], "unknown field 'sed' .did you mean 'seed'"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("ladder", words)
