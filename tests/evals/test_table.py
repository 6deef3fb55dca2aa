"""One's own results beside the paper's, and the paper's numbers themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sambay.errors import ConfigError
from sambay.evals.phonebook.books import Variant
from sambay.evals.published import published_tables, tables_of
from sambay.evals.result import Result
from sambay.evals.statistics import Metric
from sambay.evals.suites.downstream import DownstreamSuite
from sambay.evals.suites.phonebook import PhonebookSuite
from sambay.evals.suites.reasoning import ReasoningSuite
from sambay.evals.suites.ruler import RulerSuite
from sambay.evals.table import table

MINE, OTHER = {"name": "mine", "dtype": "float32"}, {"name": "other", "dtype": "float32"}


def reasoning(
    value: float = 0.5, *, digest: str = "a" * 64, model: dict[str, Any] = MINE, **changes: Any
) -> Result:
    settings = ReasoningSuite(benchmark="aime24").settings | changes
    return Result("reasoning", settings, digest, model, {"pass@1": Metric(value, 0.07, 30)})


def phonebook(*, digest: str = "b" * 64, **metrics: Metric) -> Result:
    named = {name.replace("_", "@"): metric for name, metric in metrics.items()}
    details = {"lengths": {"1850": {"group_deviation": 0.0234}}}
    settings = PhonebookSuite(variant=Variant.PUBLISHED).settings
    return Result("phonebook", settings, digest, MINE, named, details)


def rows(text: str) -> list[list[str]]:
    """The cells of every table's lines."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def row(text: str, name: str) -> list[str]:
    return next(cells for cells in rows(text) if cells[0] == name)


def test_phonebook_stands_above_the_paper() -> None:
    text = table([phonebook(accuracy_1850=Metric(0.9375, 0.0214, 128))])
    assert text.startswith("## phonebook\n")
    assert rows(text)[0] == ["model", "from", "32K (%)"]
    assert row(text, "**mine**") == ["**mine**", "this evaluation", "93.75 ± 2.14 (128) [2.34]"]
    assert row(text, "SambaY, window 256") == ["SambaY, window 256", "table 8", "92.19 [1.56]"]
    assert row(text, "SWA+YOCO, window 128")[1:] == ["figure 3", "37.50 [4.42]"]
    assert row(text, "GDNY, window 128")[1:] == ["table 5", "89.84"]
    assert row(text, "GDNY w/ GDN+GMU, window 128")[1:] == ["table 9", "54.69"]
    names = [cells[0] for cells in rows(text)]
    assert len(set(names) - {"---"}) == len(names) - 1
    assert "- mine: settings as published." in text
    assert "arXiv 2507.06607v3, table 8: models of about 1 billion parameters" in text


def test_only_shared_columns_are_compared_and_the_rest_is_listed() -> None:
    text = table(
        [phonebook(accuracy_7400=Metric(0.5, 0.01, 128), accuracy_100=Metric(1.0, 0.0, 128))]
    )
    assert rows(text)[0] == ["model", "from", "128K (%)"]
    assert "GDNY" not in text  # not measured at that length
    assert rows(text)[-3:] == [
        ["metric", "mine"],
        ["---", "---"],
        ["accuracy@100 (%)", "100.00 ± 0.00 (128)"],
    ]
    text = table([phonebook(accuracy_100=Metric(1.0, 0.0, 128))])
    assert "Nothing here is in arXiv 2507.06607v3, table 8." in text
    assert "SambaY" not in text


def test_benchmarks_of_one_model_share_a_line() -> None:
    text = table([reasoning(0.5), reasoning(0.9, digest="c" * 64, benchmark="math500", samples=8)])
    assert rows(text)[0] == ["model", "from", "AIME24 (%)", "MATH-500 (%)"]
    assert row(text, "**mine**")[2:] == ["50.00 ± 7.00 (30)", "90.00 ± 7.00 (30)"]
    assert row(text, "Phi4-mini-Flash-Reasoning")[2:] == ["52.29", "92.45"]
    assert "<sup>" not in text
    assert "- mine, aime24: settings as published." in text
    assert "- mine, math500: settings as published." in text


def test_what_was_asked_differently_is_said() -> None:
    text = table([reasoning(samples=4, max_new_tokens=2048, limit=3, seed=7)])
    assert (
        "- mine, aime24: max_new_tokens = 2048 instead of 32768; limit = 3 instead of None; "
        "samples = 4 instead of 64." in text
    )


def test_other_questions_in_one_column_are_marked() -> None:
    results = [
        reasoning(0.5),
        reasoning(0.25, digest="d" * 64, model=OTHER, limit=3),
        reasoning(0.75, digest="d" * 64, model=OTHER, limit=3, temperature=1.0),
    ]
    text = table(results)
    own = [cells for cells in rows(text) if cells[0].startswith("**")]
    assert own == [
        ["**mine**", "this evaluation", "50.00 ± 7.00 (30) <sup>a</sup>"],
        ["**other**", "this evaluation", "25.00 ± 7.00 (30) <sup>b</sup>"],
        ["**other**", "this evaluation", "75.00 ± 7.00 (30) <sup>b</sup>"],
    ]
    assert "answer different questions" in text
    assert "a: aaaaaaaa, b: dddddddd" in text
    assert "<sup>" not in table(results[1:])
    assert "<sup>" not in table([results[0], reasoning(0.1, model=OTHER)])


def test_other_questions_outside_the_papers_columns_are_marked_too() -> None:
    metrics = {"perplexity@4096": Metric(12.3456, 0.1, 9)}
    results = [
        Result("perplexity", {}, digest * 64, model, metrics)
        for digest, model in (("a", MINE), ("b", OTHER))
    ]
    text = table(results)
    assert rows(text) == [
        ["metric", "mine <sup>a</sup>", "other <sup>b</sup>"],
        ["---", "---", "---"],
        ["perplexity@4096", "12.346 ± 0.1 (9)", "12.346 ± 0.1 (9)"],
    ]
    assert "answer different questions" in text


def test_models_of_one_name_are_told_apart() -> None:
    text = table([reasoning(0.5), reasoning(0.6, model=MINE | {"dtype": "bfloat16"})])
    own = [cells[0] for cells in rows(text) if cells[0].startswith("**")]
    assert len(set(own)) == 2
    assert all(name.startswith("**mine (") for name in own)


def test_unknown_suites_and_metrics_are_listed_as_they_are() -> None:
    model = {"name": "a|b\nc"}
    text = table([Result("mirrors", {"x": 1}, "e" * 64, model, {"score": Metric(3.5, None, 7)})])
    assert text.startswith("## mirrors\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == ["| metric | a\\|b c |", "| --- | --- |", "| score | 3.5 (7) |"]
    with pytest.raises(ConfigError, match="no results"):
        table([])


def test_all_suites_have_their_own_sections() -> None:
    ruler = Result(
        "ruler", RulerSuite().settings, "f" * 64, MINE,
        {"niah_single_1@32768": Metric(0.9, 0.01, 500), "niah_single_1@4096": Metric(1, 0, 500)},
    )  # fmt: skip
    downstream = Result(
        "downstream", DownstreamSuite(limit=10).settings, "0" * 64, MINE,
        {"wikitext.word_perplexity": Metric(20.0, 0.5, 62), "piqa.acc": Metric(0.7, 0.01, 1838)},
    )  # fmt: skip
    text = table([ruler, reasoning(), downstream])
    assert [line for line in text.splitlines() if line.startswith("##")] == [
        "## ruler", "## reasoning", "## downstream",
    ]  # fmt: skip
    assert row(text, "SambaY, window 256") == ["SambaY, window 256", "table 1", "83.20"]
    assert row(text, "niah_single_1@4096 (%)")[1] == "100.00 ± 0.00 (500)"
    assert row(text, "SambaY-MLP, window 128")[2:] == ["18.70", "71.44"]
    assert ["**mine**", "this evaluation", "20 ± 0.5 (62)", "70.00 ± 1.00 (1838)"] in rows(text)
    assert "- mine: limit = 10 instead of None." in text


def test_the_papers_numbers_agree_with_themselves() -> None:
    tables = published_tables()
    for one in tables.values():
        assert one.source.startswith("arXiv 2507.06607v3, ")
        for line in one.rows:
            assert len(line.values) == len(one.columns)
            assert len(line.deviations) in (0, len(one.columns))
    for key, columns in (("ruler", 8), ("downstream", 6), ("ablation", 6), ("norm_placement", 6)):
        for line in tables[key].rows:
            *parts, average = line.values[-columns - 1 :]
            mean = math.fsum(value for value in parts if value is not None) / columns
            if (key, line.model) != ("downstream", "SWA+YOCO"):  # printed as 50.69
                assert mean == pytest.approx(average, abs=0.051 if key == "ruler" else 0.0101)
    # Each row that two tables print is the same in both.
    known = {line.name: line.values for line in tables["ablation"].rows}
    repeated = [line for line in tables["norm_placement"].rows if line.name in known]
    assert len(repeated) == 4
    assert all(line.values == known[line.name] for line in repeated)


def test_single_numbers_of_the_paper() -> None:
    tables = published_tables()
    assert tables["reasoning"].value("Phi4-mini-Flash-Reasoning", "GPQA diamond") == 45.08
    assert tables["ruler"].value("SambaY+DA", "S-3") == 69.6
    assert tables["downstream"].value("Samba+YOCO", "Wiki") == 16.73
    assert tables["phonebook"].value("SambaY", "64K") == 96.09
    assert tables["phonebook_windows"].value("SWA+YOCO", "32K", window=256) == 30.47
    assert tables["norm_placement"].value("MambaY-2 w/ NB+GMU", "Phonebook 32K") == 17.19
    with pytest.raises(KeyError, match="table 4 has nothing for SambaY"):
        tables["reasoning"].value("SambaY", "AIME24")


@pytest.mark.parametrize(
    ("suite", "settings"),
    [
        ("reasoning", ReasoningSuite(benchmark="aime24").settings),
        ("phonebook", PhonebookSuite(variant=Variant.PUBLISHED).settings),
        ("ruler", RulerSuite().settings),
        ("downstream", DownstreamSuite().settings),
    ],
)
def test_what_a_protocol_names_are_settings_of_its_suite(
    suite: str, settings: dict[str, Any]
) -> None:
    main = tables_of(suite)[0]
    for name, wanted in main.protocol.items():
        assert settings[name] == wanted
    for column in main.columns:
        assert column.settings.keys() | column.protocol.keys() <= settings.keys()
