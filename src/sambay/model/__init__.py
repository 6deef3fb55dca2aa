"""The model, its cache and its initialisation."""

from sambay.model.cache import ModelCache
from sambay.model.init import InitScheme, initialise
from sambay.model.model import LanguageModel

__all__ = ["InitScheme", "LanguageModel", "ModelCache", "initialise"]
