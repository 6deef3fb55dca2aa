"""Phonebook elsewhere: as texts to train on, and as a task of lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sambay.errors import ConfigError
from sambay.evals.phonebook.books import Protocol, first_line, questions
from sambay.evals.phonebook.documents import phone_book_documents
from sambay.evals.suites.phonebook import PhonebookSuite
from sambay.evals.tasks.phonebook import prompts as lm_eval_task

TASKS = Path(lm_eval_task.__file__).parents[1]


def test_documents_begin_with_what_a_test_asks() -> None:
    documents = list(phone_book_documents(1, 20, (3, 12), (1, 4)))
    assert documents == list(phone_book_documents(1, 20, (3, 12), (1, 4)))
    assert len(set(documents) | set(phone_book_documents(2, 20, (3, 12), (1, 4)))) == 40
    sizes = set()
    for document in documents:
        book, examples, answers = document.split("\n\n")
        assert answers.endswith("\n")
        entries, asked = book.split("\n"), answers.splitlines()
        again = examples.split("\n") + asked
        assert set(again) <= set(entries)
        assert len(set(again)) == min(len(again), len(entries)), "nothing again before all others"
        assert len({entry.split(":")[0] for entry in entries}) == len(entries)
        prompt = document[: document.index(asked[0], len(book)) + asked[0].index(":") + 1]
        assert f"\n{asked[0]}\n" in f"\n{prompt}"
        assert prompt.endswith(f"\n\n{asked[0].split(': ')[0]}:")
        sizes.add((len(entries), len(asked)))
    assert len(sizes) > 5
    tested = {
        q.prompt.split("\n\n")[0] for n in range(3, 13) for q in questions(n, Protocol(seed=1))
    }
    assert not tested & {document.split("\n\n")[0] for document in documents}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (((2, 5), (1, 2)), "pairs_range: 2 is too small"),
        (((5, 4), (1, 2)), "pairs_range = .5, 4."),
        (((5, 10**9), (1, 2)), "names there are"),
        (((5, 6), (0, 2)), "questions_range: 0"),
    ],
)
def test_documents_refuse_ranges_that_cannot_be(ranges: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        phone_book_documents(0, 1, *ranges)


def test_the_task_of_lm_eval_asks_and_scores_the_same() -> None:
    pytest.importorskip("datasets")
    rows = lm_eval_task.dataset(pairs=12, groups=2, batches=2, prompts=3, pretrained="x", seed=7)
    items = PhonebookSuite((12,), groups=2, batches=2, prompts=3).items()
    assert rows["test"]["prompt"][:] == [item.call.prompt for item in items]
    doc = rows["test"][0]
    for said, score in ((f" {doc['phone']}", 1.0), (f"\n{doc['phone']}", 0.0), ("61", 0.0)):
        assert lm_eval_task.process_results(doc, [said]) == {"exact_match": score}
        assert first_line(said) == said.split("\n")[0].strip()
    with pytest.raises(ConfigError, match="did you mean 'published'"):
        lm_eval_task.dataset(pairs=12, variant="publishd")


@pytest.mark.slow
def test_lm_eval_runs_the_group(tmp_path: Path) -> None:
    """In a process of its own: lm-eval changes loggers and caches of the whole process."""
    pytest.importorskip("lm_eval")
    script = tmp_path / "run.py"
    script.write_text(LM_EVAL_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, TASKS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "phonebook_100": [1.0, 4], "phonebook_1850": [1.0, 4], "phonebook_3700": [1.0, 4],
        "phonebook_7400": [1.0, 4],
    }  # fmt: skip


LM_EVAL_SCRIPT = """
import json, sys
import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

class Reader(LM):
    def generate_until(self, requests):
        answers = []
        for request in requests:
            prompt, options = request.args
            assert options["until"] == ["\\n"] and options["max_gen_toks"] == 20, options
            name = prompt.rsplit("\\n", 1)[1]
            entry = next(line for line in prompt.split("\\n") if line.startswith(name))
            answers.append(entry.removeprefix(name))
        return answers
    def loglikelihood(self, requests): raise NotImplementedError
    def loglikelihood_rolling(self, requests): raise NotImplementedError

manager = TaskManager(include_path=sys.argv[1], metadata={"prompts": 1, "batches": 1})
tasks = ["phonebook_100", "phonebook"]
found = lm_eval.simple_evaluate(Reader(), tasks=tasks, task_manager=manager, bootstrap_iters=0)
shown = {
    name: [values["exact_match,none"], found["n-samples"][name]["effective"]]
    for name, values in sorted(found["results"].items()) if "exact_match,none" in values
}
print(json.dumps(shown))
"""
