"""A plain-Python KV cache that says what the real one must hold: blocks are objects, sharing is identity."""

from dataclasses import dataclass, field

import numpy as np

from sparsejax.cache import CacheLayout, KVCache, RowUsage


@dataclass(eq=False)
class Block:
    """One table entry: up to page_size tokens. A token is a number; its contents follow from it, layer and head.

    A dead token, evicted by a mark only, is the negative of its number.
    """

    tokens: list[int] = field(default_factory=list)


class Oracle:
    """Mirrors every cache operation; each returns whether it must succeed, and changes nothing if not."""

    def __init__(self, layout: CacheLayout):
        self.layout = layout
        self.tables = [(tl, ht) for tl in range(layout.table_layers) for ht in range(layout.table_heads)]
        self.rows: dict[tuple[int, int, int], list[Block]] = {
            (tl, row, ht): [] for tl, ht in self.tables for row in range(layout.num_rows)
        }

    # Views.

    def tokens(self, tl: int, row: int, ht: int) -> list[int]:
        return [token for block in self.rows[tl, row, ht] for token in block.tokens]

    def length(self, tl: int, row: int, ht: int) -> int:
        return len(self.tokens(tl, row, ht))

    def is_empty(self, row: int) -> bool:
        return not any(self.rows[tl, row, ht] for tl, ht in self.tables)

    def references(self) -> dict[int, int]:
        """Reference count by block identity."""
        counts: dict[int, int] = {}
        for blocks in self.rows.values():
            for block in blocks:
                counts[id(block)] = counts.get(id(block), 0) + 1
        return counts

    @property
    def free(self) -> int:
        return self.layout.num_entries - 1 - len(self.references())

    # Operations.

    def append(self, rows: list[int], new: list[list[int]]) -> bool:
        """`allocate` and the writes after it: row rows[i] gains the tokens new[i]."""
        size, need = self.layout.page_size, 0
        for row, tokens in zip(rows, new, strict=True):
            for tl, ht in self.tables:
                if row == 0:
                    continue
                held = len(self.rows[tl, row, ht])
                total = -(-(self.length(tl, row, ht) + len(tokens)) // size)
                if total > self.layout.max_entries_per_row:
                    return False
                need += total - held
        if need > self.free:
            return False
        for row, tokens in zip(rows, new, strict=True):
            for tl, ht in self.tables:
                if row:
                    self._extend(self.rows[tl, row, ht], tokens)
        return True

    def fork(self, source: list[int], target: list[int], count: list[int]) -> bool:
        size, copies = self.layout.page_size, 0
        for src, dst, wanted in zip(source, target, count, strict=True):
            for tl, ht in self.tables:
                if self.length(tl, dst, ht):
                    return False
                copies += dst > 0 and min(wanted, self.length(tl, src, ht)) % size > 0
        if copies > self.free:
            return False
        for src, dst, wanted in zip(source, target, count, strict=True):
            for tl, ht in self.tables:
                if dst == 0:
                    continue
                taken = self.tokens(tl, src, ht)[:wanted]
                full = len(taken) // size
                self.rows[tl, dst, ht] = list(self.rows[tl, src, ht][:full])
                self._extend(self.rows[tl, dst, ht], taken[full * size :])
        return True

    def compact(self, rows: list[int], keep: np.ndarray) -> bool:
        """keep: bool[Lt, K, Ht, S]."""
        size, bound, references, plans, copies = self.layout.page_size, keep.shape[-1], self.references(), {}, 0
        for index, row in enumerate(rows):
            for tl, ht in self.tables:
                if row == 0:
                    continue
                old, tokens = self.rows[tl, row, ht], self.tokens(tl, row, ht)
                if len(tokens) > bound:
                    return False
                marks = keep[tl, index, ht, : len(tokens)]
                kept = int(marks.sum())
                holes = [t for t in range(kept) if not marks[t]]
                movers = [t for t in range(kept, len(tokens)) if marks[t]]
                after = tokens[:kept]
                for hole, mover in zip(holes, movers, strict=True):
                    after[hole] = tokens[mover]
                blocks = []
                for start in range(0, kept, size):
                    block, content = old[start // size], after[start : start + size]
                    # A block is changed if its live content is; a shared one is replaced by a copy.
                    if content == block.tokens:
                        blocks.append((block, content))
                    elif references[id(block)] > 1:
                        blocks.append((None, content))
                        copies += 1
                    else:
                        blocks.append((block, content))
                plans[tl, row, ht] = blocks
        if copies > self.free:
            return False
        for key, blocks in plans.items():
            self.rows[key] = []
            for block, content in blocks:
                if block is None:
                    block = Block()
                if block.tokens != content:
                    block.tokens = list(content)
                self.rows[key].append(block)
        return True

    def repack(self, rows: list[int], keep: np.ndarray) -> bool:
        """keep: bool[Lt, K, Ht, S]."""
        plans: dict[tuple[int, int, int], list[int]] = {}
        for index, row in enumerate(rows):
            for tl, ht in self.tables:
                tokens = self.tokens(tl, row, ht)
                if len(tokens) > keep.shape[-1]:
                    return False
                marks = keep[tl, index, ht, : len(tokens)]
                plans[tl, row, ht] = [token for token, mark in zip(tokens, marks, strict=True) if mark]
        if sum(-(-len(tokens) // self.layout.page_size) for tokens in plans.values()) > self.free:
            return False
        for key, tokens in plans.items():
            self.rows[key] = []
            self._extend(self.rows[key], tokens)
        return True

    def own_slots(self, tl: int, row: int, ht: int, *, dead: bool) -> list[int]:
        """Logical slots in blocks that no other row holds, of dead tokens or of live ones."""
        references, size = self.references(), self.layout.page_size
        blocks = self.rows[tl, row, ht]
        return [
            slot
            for slot, token in enumerate(self.tokens(tl, row, ht))
            if (token < 0) == dead and references[id(blocks[slot // size])] == 1
        ]

    def kill(self, tl: int, row: int, ht: int, slots: list[int]) -> None:
        for slot in slots:
            block = self.rows[tl, row, ht][slot // self.layout.page_size]
            block.tokens[slot % self.layout.page_size] *= -1

    def decode(self, row: int, token: int, slots: dict[tuple[int, int], int]) -> bool:
        """Writes one token over dead slots, by table; a table that names none gets it at its end."""
        size, need = self.layout.page_size, 0
        for tl, ht in self.tables:
            if (tl, ht) not in slots and self.length(tl, row, ht) % size == 0:
                need += 1
                if len(self.rows[tl, row, ht]) == self.layout.max_entries_per_row:
                    return False
        if need > self.free:
            return False
        for tl, ht in self.tables:
            if (tl, ht) in slots:
                slot = slots[tl, ht]
                self.rows[tl, row, ht][slot // size].tokens[slot % size] = token
            else:
                self._extend(self.rows[tl, row, ht], [token])
        return True

    def drop_dead(self, rows: list[int]) -> None:
        for row in rows:
            for tl, ht in self.tables:
                blocks = self.rows[tl, row, ht]
                self.rows[tl, row, ht] = [block for block in blocks if any(token > 0 for token in block.tokens)]

    def release(self, rows: list[int]) -> None:
        for row in rows:
            for tl, ht in self.tables:
                self.rows[tl, row, ht] = []

    def _extend(self, blocks: list[Block], tokens: list[int]) -> None:
        for token in tokens:
            if not blocks or len(blocks[-1].tokens) == self.layout.page_size:
                blocks.append(Block())
            blocks[-1].tokens.append(token)


def key_value(token, layer, head, head_dim: int):
    """Distinct K and V of a token; the arguments broadcast. [...] -> two f32[..., head_dim], exact in fp32."""
    base = np.asarray(token)[..., None] * 1024 + np.asarray(layer)[..., None] * 256 + np.asarray(head)[..., None] * 64
    k = (base + np.arange(head_dim)).astype(np.float32)
    return k, -k - 1


def token_position(token):
    return np.asarray(token) * 3 + 1


def check_invariants(cache: KVCache) -> None:
    """The bookkeeping invariants of the package docstring, from the cache alone."""
    layout = cache.layout
    pages, length = np.asarray(cache.table.pages), np.asarray(cache.table.length)
    stack, count, references = (np.asarray(x) for x in (cache.free.stack, cache.free.count, cache.free.references))
    entries = layout.num_entries

    assert not pages[:, 0].any()
    assert not length[:, 0].any()
    held = -(-length // layout.page_size)
    owned = np.arange(layout.max_entries_per_row) < held[..., None]
    assert ((pages > 0) == owned).all()
    np.testing.assert_array_equal(references, np.bincount(pages[owned], minlength=entries))
    for row in pages.reshape(-1, pages.shape[-1]):
        live = row[row > 0]
        assert len(set(live)) == len(live)
    free = stack[:count]
    assert sorted(free) == [entry for entry in range(1, entries) if references[entry] == 0]
    # The page that a row's next token goes to is the row's own.
    last = np.take_along_axis(pages, np.maximum(held - 1, 0)[..., None], axis=-1)[..., 0]
    assert (references[last][length % layout.page_size > 0] == 1).all()


def check_contents(cache: KVCache, oracle: Oracle) -> None:
    """Lengths, sharing, free count, K, V and positions of every row are what the oracle says."""
    layout = cache.layout
    pages, length = np.asarray(cache.table.pages), np.asarray(cache.table.length)
    k, v = np.asarray(cache.pool.k, np.float32), np.asarray(cache.pool.v, np.float32)
    position = None if cache.pool.position is None else np.asarray(cache.pool.position)
    score = None if cache.pool.score is None else np.asarray(cache.pool.score)
    assert int(cache.free.count) == oracle.free
    block_of: dict[int, int] = {}
    for (tl, row, ht), blocks in oracle.rows.items():
        tokens = np.asarray(oracle.tokens(tl, row, ht), np.int64)
        assert length[tl, row, ht] == len(tokens)
        for block, entry in zip(blocks, pages[tl, row, ht], strict=False):
            assert block_of.setdefault(int(entry), id(block)) == id(block), "an entry is shared that should not be"
        slot = np.arange(len(tokens))
        entry = pages[tl, row, ht, slot // layout.page_size]
        layers = range(layout.num_layers) if layout.table_layers == 1 else [tl]
        heads = range(layout.num_kv_heads) if layout.table_heads == 1 else [ht]
        for layer in layers:
            for head in heads:
                page = layout.address(layer).page(entry, head)
                where = (page, slot % layout.page_size)
                want_k, want_v = key_value(np.abs(tokens), layer, head, layout.head_dim)
                np.testing.assert_array_equal(k[where], want_k)
                np.testing.assert_array_equal(v[where], want_v)
                if position is not None:
                    np.testing.assert_array_equal(position[where], np.where(tokens > 0, token_position(tokens), -1))
                if score is not None:
                    # The score of a dead slot means nothing.
                    np.testing.assert_array_equal(score[where][tokens > 0], want_k[tokens > 0, 0])
    assert len(block_of) == len(oracle.references())


def check_usage(usage: RowUsage, oracle: Oracle) -> None:
    """`usage` of all rows, live tokens counted, is what the oracle's blocks say."""
    size = oracle.layout.page_size
    for row in range(1, oracle.layout.num_rows):
        lengths = [oracle.length(tl, row, ht) for tl, ht in oracle.tables]
        assert int(usage.held[row]) == sum(len(oracle.rows[tl, row, ht]) for tl, ht in oracle.tables)
        assert int(usage.next_growth[row]) == sum(length % size == 0 for length in lengths)
        assert int(usage.second_growth[row]) == sum((length + 1) % size == 0 for length in lengths)
        live = [token for tl, ht in oracle.tables for token in oracle.tokens(tl, row, ht) if token > 0]
        assert int(usage.active[row]) == len(live)
    for counts in (usage.held, usage.next_growth, usage.second_growth, usage.active):
        assert int(counts[0]) == 0
