"""The retrieval study: models of one size and one budget, trained alike, asked the same questions.

Phone books and needles at the length of training and beyond, and chains of look-ups. Everything
lives in one folder and continues where it stopped: data, runs (as those of a ladder), results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sambay.errors import ConfigError, nearest
from sambay.evals.backends.engine import EngineBackend
from sambay.evals.backends.identity import weights_sha256
from sambay.evals.backends.prompts import open_prompts
from sambay.evals.catalogue import Evaluation
from sambay.evals.result import Result
from sambay.evals.runner import Progress
from sambay.evals.suites.chains import ChainsSuite
from sambay.evals.suites.phonebook import PhonebookSuite
from sambay.evals.suites.ruler import RulerSuite
from sambay.generate import Engine, TextGenerator
from sambay.hf.tokenizer import find_tokenizer, load_tokenizer
from sambay.recipes import small_retrieval
from sambay.studies.members import Member
from sambay.studies.queue import RUNS
from sambay.studies.retrieval_documents import CHAINS, ENTRIES, PAIRS, SHORT_PAIRS
from sambay.train.export import load_checkpoint_model
from sambay.train.run_dir import MODEL

DATA, RESULTS = "data", "results"
_SHORT, _TRAINED = SHORT_PAIRS[1], PAIRS[1]  # entries of the longest books trained on


@dataclass(frozen=True)
class Contender:
    """A model of the study; `label` names its runs and nothing else.

    budgets: how many times the scale's tokens it is trained on.
    """

    label: str
    architecture: str
    window: int | None = None
    mixture: str = "look-ups"
    budgets: int = 1


CONTENDERS = (
    Contender("transformer++", "transformer++"),
    Contender("transformer-ls", "transformer-ls", 32),
    Contender("samba+yoco", "samba+yoco", 32),
    Contender("sambay", "sambay", 32),
    Contender("sambay+da", "sambay+da", 32),
    Contender("s-gdny", "s-gdny", 32),
    Contender("sambay-w16", "sambay", 16),
    Contender("sambay-w64", "sambay", 64),
    Contender("sambay-chains", "sambay", 32, "chains", budgets=2),
    Contender("transformer++-chains", "transformer++", mixture="chains", budgets=2),
)


@dataclass(frozen=True)
class Scale:
    """How much of it: tokens of a budget, who takes part, and what is asked.

    documents: of each kind to train on.
    pairs: entries of the phone books; steps: of the chains.
    lengths: of the haystacks, room for the answer included: 448 make prompts of about a row.
    """

    tokens: int = small_retrieval.TOKENS
    contenders: tuple[Contender, ...] = CONTENDERS
    documents: int = 20_000
    pairs: tuple[int, ...] = (_SHORT, _TRAINED, 2 * _TRAINED, 4 * _TRAINED)
    lengths: tuple[int, ...] = (448, 640, 1024)
    needles: int = 100
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    puzzles: int = 128

    def suites(self) -> dict[str, Evaluation]:
        """What every model is asked, by name."""
        return {
            "phonebook": PhonebookSuite(pairs=self.pairs, **asdict(ENTRIES)),
            "needles": RulerSuite(
                lengths=self.lengths,
                tasks=("niah_single_1", "niah_multikey_1"),
                samples=self.needles,
                haystack="noise",
            ),
            "chains": ChainsSuite(steps=self.steps, lines=CHAINS[0], prompts=self.puzzles),
        }


SMALLER = Scale(
    tokens=small_retrieval.TOKENS // 8,
    contenders=CONTENDERS[:4],
    documents=2_000,
    pairs=(_SHORT, _TRAINED),
    lengths=(448,),
    needles=20,
    steps=(1, 2, 4),
    puzzles=32,
)


def chosen_contenders(labels: Sequence[str]) -> tuple[Contender, ...]:
    """The contenders of these labels, in their order.

    Raises:
        ConfigError: an unknown label, or one given twice.
    """
    known = {one.label: one for one in CONTENDERS}
    for label in labels:
        if label not in known:
            raise ConfigError(f"unknown contender '{label}'{nearest(label, known)}")
        if labels.count(label) > 1:
            raise ConfigError(f"contender {label} is given twice; leave one of them out")
    return tuple(known[label] for label in labels)


def members(scale: Scale, seeds: Sequence[int], data: Path) -> list[Member]:
    """The runs of the study, for the queue of a ladder."""
    made = []
    for seed in seeds:
        for one in scale.contenders:
            window = {} if one.window is None else {"window": one.window}
            config = small_retrieval.small_retrieval(
                one.architecture,
                seed=seed,
                tokens=one.budgets * scale.tokens,
                data=str(data),
                mixture=one.mixture,
                **window,
            )
            made.append(Member(one.label, small_retrieval.DEPTH, seed, config))
    return made


def ask_all(
    runs: Sequence[Member],
    scale: Scale,
    out: Path,
    *,
    suites: Mapping[str, Evaluation] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    on_progress: Progress | None = None,
) -> dict[str, dict[str, Result]]:
    """The results of every run that has a model, by name and suite; kept in OUT/results.

    suites: instead of those of the scale.

    Raises:
        SambayError: a damaged model, or results of other questions or models in the folder.
    """
    found: dict[str, dict[str, Result]] = {}
    for member in runs:
        run_dir = out / RUNS / member.name
        if not (run_dir / MODEL).exists():
            continue
        backend = open_run(run_dir, member.name)
        found[member.name] = {}
        for suite_name, suite in (suites or scale.suites()).items():
            folder = out / RESULTS / member.name / suite_name
            result = suite.evaluate(backend, folder, on_progress=on_progress)
            found[member.name][suite_name] = result
            best = ", ".join(
                f"{name} {metric.value:.1%}" for name, metric in list(result.metrics.items())[:4]
            )
            tell(f"{member.name} {suite_name}: {best}")
    return found


def open_run(run_dir: Path, name: str) -> EngineBackend:
    """The finished model of a run as a backend, in float32.

    Raises:
        SambayError: the model or its tokenizer is damaged.
    """
    folder = run_dir / MODEL
    model = load_checkpoint_model(folder)[0]
    file = find_tokenizer(folder, None)
    tokenizer = load_tokenizer(file, folder)
    prompts = open_prompts(tokenizer, folder, file.parent, None)
    facts = {"name": name, "weights_sha256": weights_sha256(folder)}
    return EngineBackend(TextGenerator(Engine(model), tokenizer), prompts, facts)
