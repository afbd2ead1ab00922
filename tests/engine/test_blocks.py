"""The block pool under random sequences of what a scheduler may do to it; in which order free blocks are used again."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwenkit.engine.blocks import BlockPool, chain_hash

NUM_BLOCKS = 12
names = st.integers(0, 15).map(lambda i: bytes([i]))


class PoolMachine(RuleBasedStateMachine):
    """`tables` is what the holders believe; `content` is what each block's holder wrote into it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.touched: set[int] = set()
        self.released: list[int] = []  # blocks in the order in which they last became free

    @rule(count=st.integers(1, 6))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        held = {block for table in self.tables for block in table}
        nameless = [block for block in self.released if block not in self.content and block not in held]
        fresh = NUM_BLOCKS - len(self.touched)
        cached = [block for block in self.released if block in self.content and block not in held]
        blocks = self.pool.allocate(count)
        expected = nameless[::-1][:count]
        assert blocks[: len(expected)] == expected, "blocks without a hash are reused first, the last released first"
        new = blocks[len(expected) :][:fresh]
        assert not self.touched & set(new), "memory that was never touched comes next"
        rest = blocks[len(expected) + len(new) :]
        assert rest == cached[: len(rest)], "cached blocks come last, the least recently used first"
        self.touched |= set(blocks)
        assert len(set(blocks)) == count
        assert not held & set(blocks), "a held block was given out again"
        for block in blocks:
            self.content.pop(block, None)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), name=names)
    def publish(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        if block not in self.content and name not in self.content.values():
            self.content[block] = name
        self.pool.publish(block, name)

    @rule(wanted=st.lists(names, max_size=4, unique=True))
    def share(self, wanted: list[bytes]) -> None:
        blocks = self.pool.share(wanted)
        assert [self.content[block] for block in blocks] == wanted[: len(blocks)], (
            "a block was found under a wrong name"
        )
        if len(blocks) < len(wanted):
            assert wanted[len(blocks)] not in self.content.values(), "a published block was not found"
        if blocks:
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        held = {block for other in self.tables for block in other}
        for block in reversed(table):
            if block not in held:
                self.released = [*(other for other in self.released if other != block), block]

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.content)))
        self.pool.forget([block])
        del self.content[block]
        if not any(block in table for table in self.tables):
            self.released = [*(other for other in self.released if other != block), block]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check(self.tables)
        assert self.pool.num_free == NUM_BLOCKS - len({block for table in self.tables for block in table})

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        self.pool.check([])
        assert self.pool.num_free == NUM_BLOCKS


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_end_of_a_table_is_reused_before_its_beginning() -> None:
    pool = BlockPool(4)
    table = pool.allocate(3)
    for place, block in enumerate(table):
        pool.publish(block, bytes([place]))
    pool.release(table)
    pool.allocate(2)  # the never used block, then the table's last
    assert pool.share([b"\0", b"\1", b"\2"]) == table[:2]


def test_chain_hash_depends_on_everything_before() -> None:
    one, two = chain_hash(b"", [1, 2]), chain_hash(b"", [1, 3])
    assert one != two
    assert chain_hash(one, [4, 4]) != chain_hash(two, [4, 4])
    assert chain_hash(one, [4, 4]) == chain_hash(chain_hash(b"", [1, 2]), [4, 4])


def test_short_requests_touch_the_same_few_blocks() -> None:
    """Memory becomes resident when it is first written: what is used little must stay little."""
    pool = BlockPool(1000)
    touched: set[int] = set()
    for number in range(200):
        table = pool.allocate(3)
        if number % 20 == 0:
            pool.publish(table[0], number.to_bytes(2, "big"))
        touched |= set(table)
        pool.release(table)
    assert len(touched) == 3 + 200 // 20
    assert all(pool.share([number.to_bytes(2, "big")]) for number in range(0, 200, 20)), (
        "the prefix cache lost something"
    )
