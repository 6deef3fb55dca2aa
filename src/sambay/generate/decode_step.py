"""One decode step of all slots over buffers that never move: plain, or captured as CUDA graphs.

A step over the first few slots costs less than one over all. On a CPU every width is served; a
graph has a fixed one, so that one is captured for each power of two and the next larger one runs.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from sambay.layers.slots import SlotStep
from sambay.model import LanguageModel
from sambay.model.slots import SlotCache

_log = logging.getLogger("sambay.generate")
_WARM_UPS = 3  # calls before a capture, in which kernels are chosen and built


class DecodeStep:
    """Feeds the next token of every slot and counts its column.

    tokens_B: (B,) int64, written by the caller before each step.
    why_not_captured: None if steps are replayed graphs, else the reason that they are not.
    """

    def __init__(self, model: LanguageModel, cache: SlotCache, *, capture: bool = True) -> None:
        self.tokens_B = torch.zeros_like(cache.lengths_B)
        self.why_not_captured: str | None = None
        self._model, self._cache = model, cache
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        device = cache.lengths_B.device
        if not capture:
            self.why_not_captured = "not wanted"
        elif device.type != "cuda":
            self.why_not_captured = f"graphs are of CUDA, the model is on {device.type}"
        else:
            self._capture_all()

    def width(self, num_slots: int) -> int:
        """The slots of the step that serves the first `num_slots`, at least 1."""
        if not self._graphs:
            return num_slots
        return min(width for width in self._graphs if width >= num_slots)

    @torch.inference_mode()
    def run(self, width: int) -> Tensor:
        """The logits (width, V) after the tokens of the first `width` slots.

        With graphs they are overwritten by the next step.
        """
        if width not in self._graphs:
            return self._step(width)
        graph, logits_BV = self._graphs[width]
        graph.replay()
        return logits_BV

    def _step(self, width: int) -> Tensor:
        held_B = self._cache.lengths_B[:width]
        held_B.add_(held_B > 0)  # an idle slot stays at 0
        step = SlotStep(held_B)
        return self._model.decode(self.tokens_B[:width], step, self._cache.layers(width))

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
