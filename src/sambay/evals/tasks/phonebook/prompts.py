"""What lm-eval calls for its tasks of Phonebook: the questions and the scoring of this package.

lm-eval gives the text of an answer only, without what ended it, so an answer that ends in the
end-of-text token counts by its text in both variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sambay.errors import MissingPackage
from sambay.evals.phonebook.books import first_line
from sambay.evals.suites.phonebook import PhonebookSuite

if TYPE_CHECKING:
    from datasets import Dataset


_OPTIONS = ("variant", "groups", "batches", "prompts", "instruction", "depths")


def dataset(**metadata: Any) -> dict[str, Dataset]:
    """The questions of one length as the split "test", with the columns `prompt` and `phone`.

    metadata: of the task and the command line: `pairs`, and the options of `PhonebookSuite` that
        decide what is asked. What else it holds, such as the arguments of the model, has no meaning
        here; the seed is always the suite's own.

    Raises:
        ConfigError: an option that cannot work.
        MissingPackage: datasets is not installed, or names for the published variant.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingPackage("datasets", "a task of lm-eval", "eval") from error
    options = {name: metadata[name] for name in _OPTIONS if name in metadata}
    suite = PhonebookSuite(pairs=(metadata["pairs"],), **options)
    rows = [
        {
            "key": item.key,
            "prompt": item.call.prompt,
            "phone": item.gold["phone"],
            "depth": item.gold["depth"],
            "is_ambiguous": bool(item.gold["homonyms"]),
        }
        for item in suite.items()
    ]
    return {"test": Dataset.from_list(rows)}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`exact_match` of the first line of an answer with the number."""
    return {"exact_match": float(first_line(results[0]) == doc["phone"])}
