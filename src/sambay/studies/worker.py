"""One run of a ladder in a process of its own, as `sambay.studies.queue` starts it.

The configuration comes as the first line of standard input, which stays open as long as whoever
started this process lives; at its end the run saves and stops, so that no run goes on unseen.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

DIVERGED, REFUSED = 3, 2  # exit codes; 128 + signal number for a run that was stopped
ERROR = "error: "


def main(words: list[str]) -> int:
    """The exit code after training in the run directory that `words` name."""
    line = sys.stdin.buffer.readline()
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()

    import json

    from sambay.errors import SambayError
    from sambay.train.config import RunConfig
    from sambay.train.display import Display
    from sambay.train.loop import train
    from sambay.train.resilience import TrainingDiverged

    try:
        config = RunConfig.from_dict(json.loads(line))
        outcome = train(config, Path(words[0]), display=Display(line_seconds=60.0))
    except SambayError as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        return DIVERGED if isinstance(error, TrainingDiverged) else REFUSED
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by


def _stop_at_end_of_input() -> None:
    # Not through sys.stdin, whose lock this thread would still hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
