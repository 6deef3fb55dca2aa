"""Sampling against definitions written out token by token, and against its own statistics."""

from __future__ import annotations

import math

import pytest
import torch

from sambay.errors import ConfigError
from sambay.generate.sampling import (
    SamplingParams,
    SamplingTable,
    choose_tokens,
    draw,
    penalise_repeats,
    ranked,
    sample_seed,
    uniform_stream,
)

CPU = torch.device("cpu")


def support_by_definition(logits: list[float], params: SamplingParams) -> list[tuple[int, float]]:
    """(token, probability) in ranked order, by the definition in the module's docstring."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k:
        order = order[: params.top_k]
    highest = logits[order[0]]
    weights = [math.exp((logits[token] - highest) / params.temperature) for token in order]
    total = math.fsum(weights)
    kept: list[tuple[int, float]] = []
    mass = 0.0
    for token, weight in zip(order, weights, strict=True):
        if kept and params.top_p < 1 and mass >= params.top_p * total:
            break
        kept.append((token, weight))
        mass += weight
    return [(token, weight / mass) for token, weight in kept]


def token_by_definition(logits: list[float], params: SamplingParams, uniform: float) -> int:
    support = support_by_definition(logits, params)
    if not params.truncates:
        support.sort()
    reached = 0.0
    for token, probability in support:
        reached += probability
        if uniform < reached:
            return token
    return support[-1][0]


def choose(logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    return choose_tokens(logits, SamplingTable(params, CPU), None, uniforms).tolist()


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 131, 3001], ids=lambda v: f"V{v}")
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_rows_with_different_settings_choose_as_defined(vocab_size: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0.3, 1.0, 5.0)
        for top_k in (0, 1, 3, 50, vocab_size, vocab_size + 9)
        for top_p in (1.0, 0.97, 0.5, 1e-9)
    ]
    params.insert(3, SamplingParams())
    logits = torch.randn(len(params), vocab_size, generator=generator) * 2
    if tied:
        logits = (logits * 1.5).round()
    for _ in range(4 if vocab_size < 1000 else 1):
        uniforms = torch.rand(len(params), generator=generator, dtype=torch.float64).tolist()
        chosen = choose(logits, params, uniforms)
        for row, one in enumerate(params):
            values = logits[row].tolist()
            if one.greedy:
                assert chosen[row] == max(range(vocab_size), key=lambda t: (values[t], -t))
            else:
                assert chosen[row] == token_by_definition(values, one, uniforms[row]), one


def test_a_row_chooses_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.9),
        SamplingParams(temperature=9.0, top_p=0.999),
        SamplingParams(temperature=1.0, top_k=700, top_p=0.8),
    ]
    logits = torch.randn(len(params), 1000, generator=generator)
    uniforms = torch.rand(len(params), generator=generator, dtype=torch.float64).tolist()
    together = choose(logits, params, uniforms)
    for row, one in enumerate(params):
        assert choose(logits[row : row + 1], [one], [uniforms[row]]) == [together[row]]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, top_k=4),
        SamplingParams(temperature=2.0, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=6, top_p=0.9),
    ],
    ids=["plain", "top_k", "top_p", "both"],
)
def test_frequencies_follow_the_probabilities(params: SamplingParams) -> None:
    logits = [1.0, -0.5, 0.3, 0.3, 2.0, -3.0, 0.0, 1.0, -1.0]
    draws = 20_000
    stream = uniform_stream(7)
    uniforms = [stream.random() for _ in range(draws)]
    chosen = torch.tensor(choose(torch.tensor([logits] * draws), [params] * draws, uniforms))
    counts = torch.bincount(chosen, minlength=len(logits)).tolist()
    support = dict(support_by_definition(logits, params))
    assert all(counts[token] == 0 for token in range(len(logits)) if token not in support)
    chi_square = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in support.items())
    degrees = len(support) - 1
    # Mean and standard deviation of a chi-square variable are n and sqrt(2 n).
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_small_temperatures_become_greedy_without_overflow() -> None:
    logits = torch.tensor([[3.0, 80.0, 79.9, -1e30]]).repeat(3, 1)
    params = [SamplingParams(temperature=t) for t in (1e-3, 1e-30, 1e-310)]
    assert choose(logits, params, [0.999999] * 3) == [1, 1, 1]


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 6), -math.inf)
    logits[0, [2, 4]] = torch.tensor([0.0, 0.5])
    for params in (SamplingParams(temperature=2.0), SamplingParams(temperature=2.0, top_k=5)):
        drawn = {choose(logits, [params], [u])[0] for u in (0.0, 0.3, 0.6, 1 - 2**-53)}
        assert drawn == {2, 4}


def test_the_greatest_uniform_stays_inside_the_support() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.7, 0.0, 0.0]], dtype=torch.float64)
    assert draw(weights, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [2]
    assert draw(weights * 0 + 1, torch.tensor([1.0], dtype=torch.float64)).tolist() == [4]


def test_ranking_breaks_ties_by_id_also_for_zeros_and_infinities() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -0.0, 1.5, -inf, 1.5, -2.0, inf, -0.0, -1e-45, 1e-45]])
    assert ranked(logits, 10).tolist() == [[6, 2, 4, 9, 0, 1, 7, 8, 5, 3]]
    assert ranked(logits, 3).tolist() == [[6, 2, 4]]


def test_the_penalty_lowers_seen_tokens_of_its_own_row_only() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 1.0], [2.0, -2.0, 0.0, 1.0]])
    seen = torch.tensor([[True, True, True, False], [True, True, True, False]])
    lowered = penalise_repeats(logits, seen, torch.tensor([2.0, 1.0]))
    assert lowered.tolist() == [[1.0, -4.0, 0.0, 1.0], [2.0, -2.0, 0.0, 1.0]]
    params = [SamplingParams(repetition_penalty=3.0), SamplingParams()]
    table = SamplingTable(params, CPU)
    assert choose_tokens(logits, table, seen, [0.0, 0.0]).tolist() == [3, 0]


def test_the_penalty_comes_before_top_k() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.9]])
    params = SamplingParams(temperature=1.0, top_k=2, repetition_penalty=2.0)
    table = SamplingTable([params], CPU)
    seen = torch.tensor([[True, False, False]])
    drawn = {choose_tokens(logits, table, seen, [u]).item() for u in (0.0, 0.4, 0.6, 0.99)}
    assert drawn == {1, 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10**400),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
    ],
)
def test_a_bad_setting_names_its_field_and_range(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is .*must be .*\d"):
        SamplingParams(**{field: value})  # pyright: ignore[reportArgumentType]


def test_sample_seeds_of_neighbouring_runs_do_not_meet() -> None:
    seeds = {sample_seed(seed, index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert sample_seed(5, 0) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
