"""Continuing prompts: token ids (`Engine`) and text (`TextGenerator`)."""

from sambay.generate.engine import Engine
from sambay.generate.reference import reference_generate
from sambay.generate.requests import Completion, Request, TokenEvent
from sambay.generate.sampling import SamplingParams, sample_seed
from sambay.generate.session import Session
from sambay.generate.slot_engine import SlotEngine
from sambay.generate.text import TextCompletion, TextGenerator, TextStream

__all__ = [
    "Completion",
    "Engine",
    "Request",
    "SamplingParams",
    "Session",
    "SlotEngine",
    "TextCompletion",
    "TextGenerator",
    "TextStream",
    "TokenEvent",
    "reference_generate",
    "sample_seed",
]
