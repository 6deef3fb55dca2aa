"""Tables of the ladder and one's own are read, and what would spoil a fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sambay.errors import DataError
from sambay.scaling.fit_points import Resource, choose, read_points

DATA = {"data.directory": ["abc"], "data.sequence_length": 512}


def row(architecture: str, depth: int, seed: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "name": f"{architecture}-d{depth}-s{seed}",
        "architecture": architecture,
        "depth": depth,
        "seed": seed,
        "state": "finished",
        "reason": "",
        "parameters": 1000 * depth**3,
        "tokens": 20000 * depth**3,
        "flops": 10 * depth**6,
        "paper_flops": 8 * depth**6,
        "validation_loss": 2 + 5 / depth + 0.01 * seed,
        "order_seed": seed,
        "data": DATA,
        **fields,
    }


def ladder() -> list[dict[str, Any]]:
    return [row(name, depth) for name in ("sambay", "samba+yoco") for depth in (8, 12, 16, 20, 24)]


def write(folder: Path, runs: list[dict[str, Any]]) -> Path:
    path = folder / "table.json"
    path.write_text(json.dumps({"format_version": 1, "runs": runs}))
    return path


@pytest.mark.parametrize("resource", list(Resource))
def test_the_ladders_table_is_read(tmp_path: Path, resource: Resource) -> None:
    table = read_points(write(tmp_path, [*ladder(), row("sambay", 8, 1)]), resource)
    assert [points.name for points in table.points] == ["sambay", "samba+yoco"]
    sambay = choose(table.points, "sambay")
    assert len(sambay.x) == 6
    assert len(sambay.sizes) == 5
    assert sambay.has_seeds
    assert sambay.keys[0] == (8, 0)
    expected = row("sambay", 12)[resource.column]
    assert sambay.x[1] == expected
    assert sambay.losses[1] == 2 + 5 / 12


def test_unfinished_runs_are_listed_and_not_used(tmp_path: Path) -> None:
    runs = [
        *ladder(),
        row("sambay", 28, state="pending", validation_loss=None),
        row("sambay", 10, state="unbuildable", reason="odd heads", validation_loss=None),
    ]
    table = read_points(write(tmp_path, runs), Resource.FLOPS)
    assert table.left_out == ("sambay-d28-s0: pending", "sambay-d10-s0: unbuildable, odd heads")
    assert len(choose(table.points, "sambay").x) == 5


def test_a_diverged_run_stops_the_fit_until_it_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, [*ladder(), row("sambay", 28, state="diverged", validation_loss=None)])
    with pytest.raises(DataError, match=r"sambay-d28-s0: its loss is nan.*--leave-out sambay-d28"):
        read_points(path, Resource.FLOPS)
    table = read_points(path, Resource.FLOPS, ["sambay-d28-s0"])
    assert table.left_out == ("sambay-d28-s0: left out as asked",)
    assert len(choose(read_points(path, Resource.FLOPS, ["sambay-d28"]).points, "sambay").x) == 5
    with pytest.raises(DataError, match="no run 'sambay-d29' to leave out"):
        read_points(path, Resource.FLOPS, ["sambay-d29"])


@pytest.mark.parametrize(
    ("field", "value"), [("data.directory", ["xyz"]), ("data.sequence_length", 1024)]
)
def test_runs_on_different_data_are_refused_by_the_field(
    tmp_path: Path, field: str, value: Any
) -> None:
    runs = ladder()
    runs[7]["data"] = DATA | {field: value}
    message = f"saw different data: {field} is .* in sambay-d8-s0 and .* in samba.yoco-d16-s0"
    with pytest.raises(DataError, match=message):
        read_points(write(tmp_path, runs), Resource.FLOPS)


def test_runs_of_one_seed_in_another_order_are_refused(tmp_path: Path) -> None:
    runs = ladder()
    runs[6]["order_seed"] = 5
    with pytest.raises(DataError, match="order_seed is 0 in sambay-d8-s0 and 5 in samba"):
        read_points(write(tmp_path, runs), Resource.FLOPS)


def test_own_tables(tmp_path: Path) -> None:
    text = tmp_path / "losses.csv"
    text.write_text("D,L\n" + "".join(f"{D},{2 + 1 / D}\n" for D in (1, 2, 4, 8)))
    rows = tmp_path / "mine.json"
    rows.write_text(json.dumps([{"D": D, "L": 2 + 1 / D, "architecture": "a", "seed": seed}
                                for D in (1, 2, 4, 8) for seed in (0, 1)]))  # fmt: skip
    plain = read_points(text, Resource.FLOPS).points[0]
    assert (plain.name, plain.x, plain.seeds) == ("losses", (1.0, 2.0, 4.0, 8.0), (None,) * 4)
    seeded = read_points(rows, Resource.TOKENS).points[0]
    assert (seeded.name, len(seeded.x), seeded.seeds[:2]) == ("a", 8, (0, 1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "cannot be read"),
        ("bad.json", "{", "is not JSON"),
        ("odd.json", '{"rows": 3}', "expected a list of runs"),
        ("empty.json", "[]", "no finished runs"),
        ("empty.csv", "", "no finished runs"),
        ("columns.csv", "D,M\n1,2\n", "not every row has a column 'validation_loss'"),
        ("x.csv", "tokens,L\n1,2\n", "not every row has a column 'flops'; the table has L, tokens"),
        ("word.csv", "D,L\n1,high\n", "'L' is 'high', which is not a number"),
        ("seed.csv", "D,L,seed\n1,2,x\n", "seed is 'x'; it must be a whole number"),
        ("nan.csv", "D,L\n1,4\n2,nan\n3,2\n4,1\n", "nan D=2: its loss is nan"),
        ("zero.csv", "D,L\n0,4\n2,3\n3,2\n4,1\n", "zero D=0: D is 0"),
        ("few.csv", "D,L\n1,4\n2,3\n3,2\n", "few: 3 different D.*train 1 more size"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_points(path, Resource.FLOPS)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_answered_with_the_nearest(tmp_path: Path) -> None:
    table = read_points(write(tmp_path, ladder()), Resource.FLOPS)
    with pytest.raises(
        DataError, match=r"no runs of 'sambay2' in the table .did you mean 'sambay'"
    ):
        choose(table.points, "sambay2")
