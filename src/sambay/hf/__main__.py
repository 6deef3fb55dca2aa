"""The command line of transformers with our models known to it.

    python -m sambay.hf serve FOLDER     an OpenAI-compatible server (transformers[serving])
    python -m sambay.hf --help

The `transformers` command itself never imports this package, so it knows nothing of our models.
"""

from __future__ import annotations

import importlib
import sys

from sambay.hf import register


def main() -> None:
    """Hand everything over to transformers."""
    register.install()
    try:
        importlib.import_module(register.MODELS)  # registers the model classes now
        command_line = importlib.import_module("transformers.cli.transformers")
        command_line.main()
    except ModuleNotFoundError as error:
        print(
            f"error: the command line of transformers needs '{error.name}', which is not "
            'installed; install it with: pip install "transformers[serving]"',
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
