"""BlockPool: who holds which block of the key/value cache.

The cache is `num_blocks` blocks of `block_size` tokens. A block is *held* by one or more sequences (reference count above 0) or
free. A full block may be *published* under the hash of its tokens and all before them; it then can be shared while held, and
found again while free, until it is allocated for something else.

Free blocks without a hash are allocated first, the last one released first: nothing is lost with them, and memory that was
touched is touched again before memory that never was. Published ones follow, the least recently used first, so that the prefix
cache grows over the whole pool and is evicted only when nothing else is free.

Invariants (see `check`): a block is free exactly when its count is 0; counts equal the number of tables that name the block;
a hash names at most one block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a block by content: its tokens and, through `parent`, everything before them."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.reset()

    def reset(self) -> None:
        """Take every block back, whoever holds it, and forget all hashes."""
        self._references = [0] * self.num_blocks
        self._free = list(range(self.num_blocks - 1, -1, -1))  # without a hash; a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # free and published, the least recently used first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give out now, published ones included."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks that nobody holds; the caller has checked `num_free`."""
        assert count <= self.num_free, "allocate beyond num_free"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _evict(self) -> int:
        """Take the published block out of the prefix cache that has not been used for the longest time."""
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def share(self, hashes: Iterable[bytes]) -> list[int]:
        """Hold the published blocks of the longest known beginning of `hashes`."""
        blocks = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, name: bytes) -> None:
        """Say that a held, full block holds the content `name`. The first block of a content keeps the name."""
        assert self._references[block] > 0, "publish of a block nobody holds"
        if name not in self._block_of and block not in self._hash_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the hashes of blocks away, so that nobody else will share what they hold."""
        for block in blocks:
            name = self._hash_of.pop(block, None)
            if name is not None:
                del self._block_of[name]
                if self._references[block] == 0:
                    del self._cached[block]
                    self._free.append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a table. The table's end becomes free first and is reused first, because
        the beginning is what other requests are likely to share.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, "release of a block nobody holds"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the invariants, given the block tables of all sequences that hold blocks. Looks at every block."""
        held = Counter(block for table in tables for block in table)
        free = Counter([*self._free, *self._cached])
        for block, count in enumerate(self._references):
            assert count == held[block], f"block {block} has {count} references, {held[block]} tables name it"
            assert (count == 0) == (free[block] == 1), f"block {block} is both held and free, or neither"
        assert len(self._block_of) == len(self._hash_of)
        assert all(self._hash_of[block] == name for name, block in self._block_of.items())
        assert all(block in self._hash_of for block in self._cached), "a block without a hash is among the cached"
        assert not any(block in self._hash_of for block in self._free), (
            "a published block is among those without a hash"
        )
