"""DataStream: what the training loop iterates. Micro-batches of one rank, exactly resumable.

In: TrainConfig, tokenizer, chat format, rank and world size. Out: TrainBatches, the same number for every rank; nothing is
repeated to get there, a rank for which the last round has no sequence gets one in which nothing is learned. The state counts
sequences of all ranks together, so it fits any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import IGNORE, Pair, Sample, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.pipeline import Report
from qwenkit.train.data.render import Item
from qwenkit.train.data.stored import StoredData
from qwenkit.train.data.streamed import StreamedData


class DataStream:
    """Iterating goes through what is left of the current epoch; iterating again, through the next one.

    The state belongs to the last batch that was given out: a stream that loads it goes on with the batch after it. Raises
    DataError (a ValueError with a report) for records that the policies do not let pass, ValueError for settings that do not go
    together and where no data is left, FileNotFoundError for a data set that is missing.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        chat_format: ChatFormat | None,
        *,
        rank: int = 0,
        world_size: int = 1,
        split: Literal["train", "eval"] = "train",
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, allowed are 0 to {world_size - 1}")
        if split == "eval" and not config.has_eval:
            raise ValueError("there is no evaluation data: neither val_size nor eval_dataset is given")
        if config.mix_strategy == "concat" and config.mix_weights:
            raise ValueError("mix_weights need mix_strategy interleave_under or interleave_over")
        self._rank, self._world_size = rank, world_size
        batch_size = config.batch_size
        if split == "eval" and config.per_device_eval_batch_size is not None:
            batch_size = config.per_device_eval_batch_size
        self._round = batch_size * world_size  # sequences of all ranks in one micro-batch
        self._position = 0  # sequences given out in this epoch
        self._epoch = 0
        self._data: StoredData | StreamedData
        if config.streaming:
            self._data = StreamedData(config, tokenizer, chat_format, split)
        else:
            self._data = StoredData(config, tokenizer, chat_format, split)

    @property
    def report(self) -> Report:
        """What reading the data gave; of streamed data, what was read so far."""
        return self._data.report

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self._data.epoch if isinstance(self._data, StreamedData) else self._epoch

    @property
    def batches_per_epoch(self) -> int | None:
        """Micro-batches of each rank in a whole epoch; None when streaming."""
        return None if isinstance(self._data, StreamedData) else -(-len(self._data.plan) // self._round)

    def __iter__(self) -> Iterator[TrainBatch]:
        epoch = self.epoch
        while self.epoch == epoch:
            sequences = self._take()
            if sequences:
                yield self._batch(sequences)

    def _take(self) -> list[list[Item]]:
        """The next round's sequences; after the last ones of an epoch the position is the beginning of the next."""
        if isinstance(self._data, StreamedData):
            return self._data.take(self._round)
        total = len(self._data.plan)
        end = min(total, self._position + self._round)
        sequences = [self._data.sequence(self._epoch, index) for index in range(self._position, end)]
        self._position = end
        if end == total:
            self._epoch, self._position = self._epoch + 1, 0
        return sequences

    def _batch(self, sequences: list[list[Item]]) -> TrainBatch:
        """This rank's share of a round: as equal as can be; nothing to learn where there are fewer sequences than ranks."""
        count, extra = divmod(len(sequences), self._world_size)
        first = self._rank * count + min(self._rank, extra)
        own = sequences[first : first + count + (self._rank < extra)]
        batch = _laid_out([item for sequence in own or [sequences[0]] for item in sequence])
        if own:
            return batch
        labels = torch.full_like(batch.labels, IGNORE)
        return TrainBatch(batch.ids, labels, batch.lengths, batch.origins, None if batch.pairs is None else [])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        if isinstance(self._data, StreamedData):
            return {"streaming": True, **self._data.state()}
        return {
            "streaming": False,
            "epoch": self._epoch,
            "sequence": self._position,
            "num_sequences": len(self._data.plan),
            "data": self._data.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises ValueError where it belongs to other data or other settings of it."""
        if state["streaming"] != isinstance(self._data, StreamedData):
            raise ValueError("the checkpoint's data was read with another setting of streaming")
        if isinstance(self._data, StreamedData):
            self._data.load(state)
            return
        if state["data"] != self._data.fingerprint or state["num_sequences"] != len(self._data.plan):
            raise ValueError("the data, or how it is read and packed, has changed since the checkpoint was written")
        self._epoch, self._position = state["epoch"], state["sequence"]


def _laid_out(items: list[Item]) -> TrainBatch:
    pairs = [item for item in items if isinstance(item, Pair)]
    return TrainBatch.of_pairs(pairs) if pairs else TrainBatch.of([item for item in items if isinstance(item, Sample)])
