"""One decode step of all slots over buffers that never move: plain, or captured.

Captured is a CUDA graph on a GPU, and on a CPU the list of the kernels that a step calls, replayed
by one call. A step over the first few slots costs less than one over all. On a CPU every width is
served, and recorded when it is first met; a graph has a fixed one, so that one is captured for each
power of two and the next larger one runs.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from sambay.layers.quantised import held_tensors
from sambay.layers.slots import SlotStep
from sambay.model import LanguageModel
from sambay.model.slots import SlotCache
from sambay.ops.decode import count_columns
from sambay.ops.native.library import why_unavailable
from sambay.ops.native.recording import Recorder, Recording

_log = logging.getLogger("sambay.generate")
_WARM_UPS = 3  # calls before a capture, in which kernels are chosen and built


class DecodeStep:
    """Feeds the next token of every slot and counts its column.

    The model's weights must stay as they are, and the cache where it is: calls are repeated with
    their addresses, and what follows from weights alone was computed once.

    tokens_B: (B,) int64, written by the caller before each step.
    why_not_captured: None if steps are replayed, else the reason that they are not.
    """

    def __init__(self, model: LanguageModel, cache: SlotCache, *, capture: bool = True) -> None:
        self.tokens_B = torch.zeros_like(cache.lengths_B)
        self.why_not_captured: str | None = None
        self._model, self._cache = model, cache
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # By width and number of threads; None where a step cannot be recorded.
        self._recordings: dict[tuple[int, int], tuple[Recording, Tensor] | None] = {}
        self._buffers: list[Tensor] = []
        device = cache.lengths_B.device
        if not capture:
            self.why_not_captured = "not wanted"
        elif device.type == "cuda":
            self._capture_all()
        elif device.type == "cpu":
            self.why_not_captured = why_unavailable()
            if self.why_not_captured is None:
                self._record(1)  # all slots are idle, so that nothing is stored
                if self.why_not_captured is not None:
                    self._recordings.clear()  # other widths will fare no better
        else:
            self.why_not_captured = f"there is nothing to capture steps with on {device.type}"

    def width(self, num_slots: int) -> int:
        """The slots of the step that serves the first `num_slots`, at least 1."""
        if not self._graphs:
            return num_slots
        return min(width for width in self._graphs if width >= num_slots)

    @torch.inference_mode()
    def run(self, width: int) -> Tensor:
        """The logits (width, V) after the tokens of the first `width` slots.

        If steps are captured they are overwritten by the next step.
        """
        if width in self._graphs:
            graph, logits_BV = self._graphs[width]
            graph.replay()
            return logits_BV
        if not self._recordings:
            return self._step(width)
        key = (width, torch.get_num_threads())
        if key not in self._recordings:
            return self._record(width)
        recorded = self._recordings[key]
        if recorded is None:
            return self._step(width)
        recording, logits_BV = recorded
        recording.replay()
        return logits_BV

    @torch.inference_mode()
    def seconds_by_kernel(self, width: int) -> dict[str, float] | None:
        """Take a step of that width, and tell how long each kernel took; None if none is recorded.

        The calls from Python are counted too, about a microsecond each.
        """
        recorded = self._recordings.get((width, torch.get_num_threads()))
        if recorded is None:
            return None
        seconds: dict[str, float] = {}
        for name, one in zip(recorded[0].names, recorded[0].replay_timed(), strict=True):
            seconds[name] = seconds.get(name, 0.0) + one
        return seconds

    def _step(self, width: int) -> Tensor:
        held_B = self._cache.lengths_B[:width]
        count_columns(held_B)
        step = SlotStep(held_B)
        return self._model.decode(self.tokens_B[:width], step, self._cache.layers(width))

    @torch.inference_mode()
    def _record(self, width: int) -> Tensor:
        """Take a step and record it, if that is possible."""
        recorder = Recorder(width, self._cache.num_slots, self._buffers)
        with recorder:
            logits_BV = self._step(width)
        recording = recorder.result()
        key = (width, torch.get_num_threads())
        self._recordings[key] = None if recording is None else (recording, logits_BV)
        if recording is None and self.why_not_captured is None:
            at = "" if len(self._recordings) == 1 else f"of {width} slots: "
            self.why_not_captured = f"{at}{recorder.reason}"
            _log.info("decode steps are not replayed: %s", self.why_not_captured)
        return logits_BV

    @torch.inference_mode()
    def _capture_all(self) -> None:
        """Capture every width while all slots are idle, so that nothing is stored."""
        num_slots = self._cache.num_slots
        widths = {1 << power for power in range(num_slots.bit_length()) if 1 << power < num_slots}
        side = torch.cuda.Stream()
        try:
            # The widest first: later ones share its memory.
            pool = None
            for width in sorted(widths | {num_slots}, reverse=True):
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UPS):
                        self._step(width)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    logits_BV = self._step(width)
                pool = graph.pool()
                self._graphs[width] = graph, logits_BV
        except RuntimeError as error:  # what cannot be captured is reported by CUDA as this
            self._graphs.clear()
            reason = str(error).splitlines()[0]
            self.why_not_captured = f"the capture failed: {reason}"
            _log.warning("decode steps are not captured as a CUDA graph: %s", reason)


def weight_places(model: LanguageModel) -> list[tuple[int, int]]:
    """Where weights lie, and how often they were changed in place.

    Of quantised ones that is where their integers and scales lie; of others that are no plain
    parameters nothing is captured.
    """
    places = []
    for weight in model.parameters():
        if weight.is_meta:
            continue
        if type(weight) is nn.Parameter:
            places.append((weight.data_ptr(), _version(weight)))
        elif held := held_tensors(weight):
            places.append((0, _version(weight)))  # torchao changes what is inside uncounted
            places += [(tensor.data_ptr(), _version(tensor)) for tensor in held]
    return places


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
