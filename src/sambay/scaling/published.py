"""The paper's own losses and fitted constants, to fit again and to compare with.

Source: arXiv 2507.06607, figures 2 and 7; `published.json` says where each number is from.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math

from sambay.scaling.fit import Noise, NoiseSource
from sambay.scaling.fit_points import Points


@dataclasses.dataclass(frozen=True)
class PublishedStudy:
    """One figure: D in `unit`, the losses of each curve, and A, b, C as its legend prints them.

    `drawn` names the curves a picture shows, `baseline` the one that differences refer to, and
    `compared` the two the paper sets against each other. `reruns` are losses of a second run of
    every point of some curves.
    """

    key: str
    title: str
    unit: str
    note: str
    points: tuple[Points, ...]
    printed: dict[str, tuple[float, float, float]]
    drawn: tuple[str, ...]
    baseline: str
    compared: tuple[str, str]
    reruns: dict[str, tuple[float, ...]]

    def curve(self, name: str) -> Points:
        """The points of one curve of this study."""
        return next(points for points in self.points if points.name == name)

    def rerun_noise(self) -> Noise | None:
        """The noise between a run and its repetition, over all curves that have one."""
        squares = [
            (loss - again) ** 2 / 2
            for name, losses in self.reruns.items()
            for loss, again in zip(self.curve(name).losses, losses, strict=True)
        ]
        if not squares:
            return None
        return Noise(math.sqrt(sum(squares) / len(squares)), len(squares), NoiseSource.GIVEN)


def published_studies() -> tuple[PublishedStudy, ...]:
    """The scaling of the loss with FLOPs (figure 2a) and with tokens (figures 2b and 7)."""
    text = importlib.resources.files("sambay.scaling").joinpath("published.json").read_text("utf-8")
    return tuple(
        PublishedStudy(
            key=study["key"],
            title=study["title"],
            unit=study["unit"],
            note=study["note"],
            points=tuple(
                Points.of(curve["name"], study["x"], curve["losses"]) for curve in study["curves"]
            ),
            printed={
                curve["name"]: tuple(curve["printed"])
                for curve in study["curves"]
                if curve["printed"] is not None
            },
            drawn=tuple(study["drawn"]),
            baseline=study["baseline"],
            compared=tuple(study["compare"]),
            reruns={name: tuple(losses) for name, losses in study["reruns"].items()},
        )
        for study in json.loads(text)["studies"]
    )
