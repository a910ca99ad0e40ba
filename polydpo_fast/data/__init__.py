"""Preference pairs from files, in an order that survives crashes, bad files and another world size."""

from .batch import PairBatch
from .dali.decoder import CanaryError, DaliDecoder, choose_decoder
from .ledger import read_ledger
from .loader import LoaderError, LoaderStats, PairLoader
from .source import Pair, PairError, Source, SourceError
from .sources import open_source

__all__ = [
    "CanaryError",
    "DaliDecoder",
    "LoaderError",
    "LoaderStats",
    "Pair",
    "PairBatch",
    "PairError",
    "PairLoader",
    "Source",
    "SourceError",
    "choose_decoder",
    "open_source",
    "read_ledger",
]
