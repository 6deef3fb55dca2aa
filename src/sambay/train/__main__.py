"""`torchrun ... -m sambay.train RECIPE ...`: the command `sambay train`, in every process."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from sambay.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
