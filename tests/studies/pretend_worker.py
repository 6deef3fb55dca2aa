"""Stands in for `sambay.studies.worker`: leaves what a run leaves, in milliseconds, without torch.

What goes wrong is said in the environment: PRETEND = {"RUN NAME": "diverge"}, or one of
fail, crash, kill, kill once, wait.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from sambay.studies.worker import DIVERGED, REFUSED


def main(run_dir: Path) -> int:
    config = json.loads(sys.stdin.buffer.readline())
    todo = json.loads(os.environ.get("PRETEND", "{}")).get(run_dir.name, "")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(config))
    starts = run_dir / "starts.txt"
    with starts.open("a") as file:
        file.write(f"{config['device']} {config['threads']}\n")
    if todo == "diverge":
        print("error: step 3: the loss is nan", file=sys.stderr)
        return DIVERGED
    if todo == "fail":
        print("error: the disk is full", file=sys.stderr)
        return REFUSED
    if todo == "crash":
        raise RuntimeError("a bug")
    if todo == "kill" or (todo == "kill once" and starts.read_text().count("\n") == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if todo == "wait":

        def stop(number: int, frame: FrameType | None) -> None:
            (run_dir / "saved").touch()
            os._exit(128 + number)

        signal.signal(signal.SIGTERM, stop)
        (run_dir / "waits").touch()
        time.sleep(60)
    write_end(run_dir, config)
    return 0


def write_end(run_dir: Path, config: dict) -> None:
    """A model and the last line of the metrics."""
    tokens = config["batch"]["global_batch_size"] * config["data"]["sequence_length"]
    steps = config["schedule"]["total_tokens"] // tokens
    loss = 5.0 - config["model"]["hidden_size"] / 50 + config["seed"] / 1000
    line = {"step": steps, "tokens": steps * tokens, "seconds": 1.5, "loss": loss}
    measured = {"validation_loss": loss, "validation_bits_per_byte": loss / 2}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line | measured) + "\n")
    (run_dir / "model").mkdir(exist_ok=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
