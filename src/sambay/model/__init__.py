"""The model, its cache and its initialisation."""

from sambay.model.cache import ModelCache
from sambay.model.init import initialise
from sambay.model.model import LanguageModel

__all__ = ["LanguageModel", "ModelCache", "initialise"]
