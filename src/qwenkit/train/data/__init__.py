"""Data for training: files on disk become micro-batches of token ids, labels and document lengths, the same on every run."""

from qwenkit.train.data.pipeline import DataError, Report, check
from qwenkit.train.data.stream import DataStream

__all__ = ["DataError", "DataStream", "Report", "check"]
