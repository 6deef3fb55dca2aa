"""The paper's losses give the paper's constants, to the digits it prints.

Source: arXiv 2507.06607, legends of figures 2 and 7. The constants with more digits, and the
standard errors, are those of an independent fit of the same losses.
"""

from __future__ import annotations

import pytest

from sambay.scaling.compare import compare, verdict
from sambay.scaling.fit import PowerLaw, fit_power_law
from sambay.scaling.published import PublishedStudy, published_studies

STUDIES = {study.key: study for study in published_studies()}
LAWS = {
    (study.key, points.name): fit_power_law(points)
    for study in STUDIES.values()
    for points in study.points
}
PRINTED = {
    ("flops", "Transformer++ SP"): (239.90, 0.12, 1.11),
    ("flops", "Transformer++ muP++"): (49.64, 0.07, 0.64),
    ("flops", "Samba+YOCO muP++"): (40.57, 0.07, 0.61),
    ("flops", "SambaY muP++"): (39.79, 0.07, 0.58),
    ("tokens", "Transformer++ SP"): (1.61, 0.44, 1.86),
    ("tokens", "Transformer++ muP"): (17.92, 1.10, 1.96),
    ("tokens", "Transformer++ muP++"): (1.28, 0.37, 1.82),
    ("tokens", "Transformer++ muP++ batch scaling"): (1.16, 0.36, 1.83),
    ("tokens", "Transformer++ muP++ normal init"): (2.08, 0.45, 1.84),
    ("tokens", "Samba+YOCO muP++"): (1.27, 0.41, 1.83),
    ("tokens", "SambaY muP++"): (1.17, 0.38, 1.82),
}
REFITTED = {
    ("flops", "Transformer++ muP"): (54.54, 0.08, 0.64),
    ("tokens", "Transformer++ muP++ untied"): (1.30, 0.40, 1.83),
    ("tokens", "Transformer++ muP++ untied WSD"): (1.53, 0.47, 1.86),
    ("tokens", "Transformer++ muP++ untied LR-scaling + indep. WD"): (1.03, 0.35, 1.82),
}
PRECISE = {  # A, b, C and the standard error of C
    "Transformer++ SP": (239.897, 0.115319, 1.111272, 0.131),
    "Transformer++ muP": (54.538, 0.076251, 0.642776, 0.0755),
    "Transformer++ muP++": (49.638, 0.074492, 0.641581, 0.012),
    "Samba+YOCO muP++": (40.574, 0.070187, 0.606904, 0.030),
    "SambaY muP++": (39.790, 0.069428, 0.584707, 0.033),
}


@pytest.mark.parametrize("curve", {**PRINTED, **REFITTED}, ids="-".join)
def test_constants_as_printed(curve: tuple[str, str]) -> None:
    law = LAWS[curve]
    found = tuple(round(value, 2) for value in (law.A, law.b, law.C))
    assert found == {**PRINTED, **REFITTED}[curve]


def test_every_published_curve_is_checked_and_carries_its_legend() -> None:
    assert set(LAWS) == set(PRINTED) | set(REFITTED)
    legends = {(study.key, name): printed for study in STUDIES.values()
               for name, printed in study.printed.items()}  # fmt: skip
    assert legends == PRINTED


@pytest.mark.parametrize("name", PRECISE)
def test_constants_and_standard_errors_to_more_digits(name: str) -> None:
    law, (A, b, C, error) = LAWS["flops", name], PRECISE[name]
    assert pytest.approx(A, abs=2e-3) == law.A
    assert law.b == pytest.approx(b, abs=1e-6)
    assert pytest.approx(C, abs=2e-6) == law.C
    assert law.errors["C"] == pytest.approx(error, abs=5.1e-4)


def test_r_squared_as_claimed_except_for_the_diverged_run() -> None:
    """The paper claims at least 0.999; two fits fall just short, and the diverged one far."""
    short = {name for name, law in LAWS.items() if law.r_squared < 0.9988}
    assert short == {("tokens", "Transformer++ muP")}
    assert LAWS["tokens", "Transformer++ muP"].at_bound == ("C",)


def law_of(study: PublishedStudy, name: str) -> PowerLaw:
    return LAWS[study.key, name]


def test_sambay_and_samba_yoco_cross_beyond_the_largest_run_and_are_not_told_apart() -> None:
    study = STUDIES["flops"]
    first, second = (law_of(study, name) for name in study.compared)
    largest = float(first.x.max())
    made = compare(first, second, [largest, 10 * largest], draws=1500)
    assert made.crossings.points == pytest.approx((9.99e21,), rel=2e-3)
    assert largest < made.crossings.points[0]
    assert made.crossings.regions[-1].high == pytest.approx(made.crossings.high)  # no upper end
    assert made.crossings.regions[-1].low < largest
    assert all(gap > 0 for _, gap in made.measured_by_size)  # SambaY is behind at every depth
    assert not made.C.is_clear
    assert not made.losses[10 * largest].is_clear
    assert "no upper end" not in verdict(made)[0]
    assert "without an upper end" in verdict(made)[-1]


def test_both_hybrids_are_clearly_better_than_the_transformer_at_the_measured_sizes() -> None:
    study = STUDIES["flops"]
    base = law_of(study, study.baseline)
    for name in study.compared:
        made = compare(law_of(study, name), base, [float(base.x[2]), float(base.x[-1])], draws=800)
        assert all(gap.is_clear and gap.estimate < 0 for gap in made.losses.values())
    gaps = [round(gap, 3) for _, gap in made.measured_by_size]
    assert gaps == [-0.061, -0.040, -0.029, -0.021, -0.018]


def test_noise_between_a_run_and_its_repetition() -> None:
    noise = STUDIES["tokens"].rerun_noise()
    assert noise is not None
    assert noise.freedom == 12
    assert 4e-4 < noise.sigma < 8e-4
    assert STUDIES["flops"].rerun_noise() is None
