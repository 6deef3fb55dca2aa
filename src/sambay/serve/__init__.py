"""The plugin that lets vLLM serve this package's models; the only room that knows vLLM.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

from sambay.serve.versions import refuse_other_versions


def register() -> None:
    """Make the model types and architectures known to vLLM; a second call changes nothing.

    The model classes are given by name, so that no process imports them before it needs them.

    Raises:
        BackendUnavailable: a version of vLLM outside the supported range.
    """
    refuse_other_versions()
    from sambay.serve.registration import install

    install()
