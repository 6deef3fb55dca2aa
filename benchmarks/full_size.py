"""The full 3.85 B model on this machine: writing, loading and generating, with peak memory.

    python -m benchmarks.full_size --folder build/flash --out build/benchmarks/full_size.json

The weights are random (`sambay init phi4-mini-flash`); times and memory do not depend on their
values. Writing, loading and generating each run in a process of their own, so that each has a peak
of its own; a folder that is there already is not written again. Peak memory is the kernel's mark
(VmHWM) above what the process used before.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, write_result
from sambay.generate import Engine, Session
from sambay.generate.requests import Request
from sambay.hf import official
from sambay.hf.quantisation import quantise
from sambay.hf.random_checkpoint import Layout, write_random_checkpoint
from sambay.model import LanguageModel
from sambay.model.folder import stored_tensors
from sambay.spec import InitScheme, presets

PROMPTS, NEW_TOKENS = (64, 512), 16
TOP_OPERATIONS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/flash"))
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/full_size.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--only", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only is not None:
        print(json.dumps(STAGES[args.only](args)))
        return
    result: dict[str, Any] = {"environment": environment()}
    for name in args.stages:
        if name == "write" and args.folder.exists():
            print(f"write: {args.folder} is there already")
            continue
        result[name] = in_a_process(name)
        print(f"{name}: {json.dumps(result[name], indent=2)}", flush=True)
    result["load_average_after"] = environment()["load_average"]
    write_result(args.out, result)


def in_a_process(name: str) -> dict[str, Any]:
    """What one stage measured, with the options of this process."""
    command = [sys.executable, "-m", "benchmarks.full_size", *sys.argv[1:], "--only", name]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def write(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of writing the checkpoint."""
    config = presets.phi4_mini_flash()
    before, began = peak_bytes(), time.perf_counter()
    write_random_checkpoint(
        args.folder, config, Layout.OFFICIAL, dtype=torch.bfloat16, scheme=InitScheme.STANDARD
    )
    seconds, written = time.perf_counter() - began, folder_bytes(args.folder)
    return {
        "seconds": seconds,
        "bytes": written,
        "bytes_per_second": written / seconds,
        "peak_bytes": peak_bytes() - before,
    }


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of loading, against the bytes of the model itself."""
    measured, _ = loaded(args)
    return measured


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode speed per prompt length, and where the time of a step goes."""
    _, model = loaded(args)
    measured: dict[str, Any] = {
        f"prompt_{length}": continue_prompt(model, length) for length in PROMPTS
    }
    measured["floor_seconds_per_token"] = read_seconds(model)
    measured["operations"] = {
        "decode": operations(lambda: continue_prompt(model, 1)),
        "prefill": operations(lambda: continue_prompt(model, PROMPTS[0], new_tokens=1)),
    }
    measured["linear_bytes_per_second"] = linear_rates()
    measured["peak_bytes_of_process"] = peak_bytes()
    return measured


def quantised(args: argparse.Namespace, weights: str) -> dict[str, Any]:
    """The same with integers as weights, for the shorter prompt."""
    _, model = loaded(args)
    began = time.perf_counter()
    quantise(model, weights)
    seconds = time.perf_counter() - began
    return {
        "quantising_seconds": seconds,
        f"prompt_{PROMPTS[0]}": continue_prompt(model, PROMPTS[0]),
        "peak_bytes_of_process": peak_bytes(),
    }


def transformers(args: argparse.Namespace) -> dict[str, Any]:
    """The same through transformers: loading, and seconds of `generate` for the shorter prompt."""
    from sambay.hf.modeling import Phi4FlashForCausalLM

    before, began = peak_bytes(), time.perf_counter()
    model = Phi4FlashForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    seconds, peak = time.perf_counter() - began, peak_bytes() - before
    own = sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(PROMPTS[0])
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPTS[0]), generator=generator)
    began = time.perf_counter()
    ids = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {
        "seconds": seconds,
        "model_bytes": own,
        "peak_bytes": peak,
        "peak_over_model": peak / own,
        "generate_seconds": time.perf_counter() - began,
        "peak_over_model_after_generating": (peak_bytes() - before) / own,
        "tokens": ids[0, PROMPTS[0] :].tolist(),
    }


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "write": write,
    "load": load,
    "generate": generate,
    "int8": functools.partial(quantised, weights="int8"),
    "int4": functools.partial(quantised, weights="int4"),
    "transformers": transformers,
}


def loaded(args: argparse.Namespace) -> tuple[dict[str, Any], LanguageModel]:
    """What loading took, and the model."""
    before, began = peak_bytes(), time.perf_counter()
    model = official.load(args.folder, dtype=getattr(torch, args.dtype))
    seconds, peak = time.perf_counter() - began, peak_bytes() - before
    own = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    measured = {
        "seconds": seconds,
        "model_bytes": own,
        "peak_bytes": peak,
        "peak_over_model": peak / own,
        "parameters": sum(tensor.numel() for tensor in stored_tensors(model).values()),
    }
    return measured, model


def continue_prompt(
    model: LanguageModel, length: int, new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """Speeds of continuing a prompt of random ids by `new_tokens` tokens."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
    engine = Engine(model)
    tokens, times = [], []
    for event in Session(engine).stream(Request(prompt.tolist(), max_new_tokens=new_tokens)):
        tokens.append(event.token)
        times.append(time.perf_counter())
    assert len(tokens) == new_tokens
    timings = engine.timings
    measured = {
        "tokens": tokens,
        "prefill_seconds": timings.prefill_seconds,
        "prefill_tokens_per_second": timings.prefill_tokens / timings.prefill_seconds,
        "decode_seconds": timings.decode_seconds,
    }
    # The first step is the one that is recorded.
    if steps := [after - before for before, after in itertools.pairwise(times)][1:]:
        measured["seconds_per_token"] = statistics.median(steps)
    return measured


def read_seconds(model: LanguageModel) -> float:
    """Seconds to read every weight once with all threads, which each decoded token must at least.

    Measured by summing the largest tensors, the best of three.
    """
    tensors = sorted(stored_tensors(model).values(), key=lambda tensor: -tensor.nbytes)
    sample = [tensor.detach().view(-1).view(torch.float32) for tensor in tensors[1:9]]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for tensor in sample:
            tensor.sum()  # of the bits: reads like any sum, and means nothing
        times.append(time.perf_counter() - began)
    return min(times) * sum(t.nbytes for t in tensors) / sum(t.nbytes for t in sample)


def operations(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The operations that take most of the processor, by their own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "name": event.key,
            "calls": event.count,
            "seconds": event.self_cpu_time_total / 1e6,
            "share": event.self_cpu_time_total / total,
        }
        for event in events[:TOP_OPERATIONS]
    ]


@torch.inference_mode()
def linear_rates() -> dict[str, Any]:
    """How fast one thread reads the weights of a large projection, by dtype and rows.

    In bytes per second of processor time, best of nine, which other programs disturb less than wall
    time; beside it the rate of a plain sum, which only reads.
    """
    config = presets.phi4_mini_flash()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = torch.ones(64 << 20)
    rates: dict[str, Any] = {"sum": plain.nbytes / processor_seconds(plain.sum)}
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(2 * config.intermediate_size, config.hidden_size).to(dtype)
        entry = rates[str(dtype).removeprefix("torch.")] = {}
        for rows in (1, 8, 64):
            x = torch.randn(rows, config.hidden_size).to(dtype)
            linear = functools.partial(torch.nn.functional.linear, x, weight)
            entry[f"rows_{rows}"] = weight.nbytes / processor_seconds(linear)
    torch.set_num_threads(threads)
    return rates


def processor_seconds(call: Callable[[], object]) -> float:
    """Processor time of this thread for a call, the best of nine."""
    times = []
    for _ in range(9):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return min(times)


def peak_bytes() -> int:
    """The most memory this process has had in RAM so far."""
    with open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the peak of a process")


def folder_bytes(folder: Path) -> int:
    """The bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()
