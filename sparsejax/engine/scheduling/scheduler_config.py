"""The limits that the scheduler keeps."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sparsejax.engine.requests.footprint import Pool
from sparsejax.engine.scheduling.buckets import mixed_buckets, prefill_buckets, prompt_room
from sparsejax.engine.scheduling.store_limits import StoreLimits
from sparsejax.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of the engine.

    Attributes:
      max_num_seqs: requests that hold a row at once.
      max_num_batched_tokens: tokens of a step that only prefills.
      max_mixed_tokens: tokens of a step in which requests decode, at most as many. Decodes count, but leave half of it
        to prompts (`buckets.prompt_room`).
      max_prefill_seqs: requests with a chunk in one prefill step.
      page_size: tokens of a page.
      num_free_entries: table entries of the empty pool.
      entries_per_page_column: entries that `page_size` tokens of a request take (table layers times table heads).
      max_model_len: most tokens of prompt and answer.
      max_resident_rows: rows beyond max_num_seqs, so that at least as many can stay resident; 0 turns prefix caching
        off. Rows are numbered 1 to max_num_seqs + max_resident_rows.
      store: limits of an engine that stores requests compressed, which replace those of the pool; None: it is none.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_mixed_tokens: int
    max_prefill_seqs: int
    page_size: int
    num_free_entries: int
    entries_per_page_column: int
    max_model_len: int
    max_resident_rows: int = 0
    store: StoreLimits | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name == "store":
                continue
            least = 0 if each.name == "max_resident_rows" else 1
            if getattr(self, each.name) < least:
                raise InvalidArgumentError(f"{each.name} must be at least {least}, got {getattr(self, each.name)!r}.")

    def prompt_room(self, num_decodes: int) -> int:
        """Prompt tokens for which a step has room in which so many requests decode; with more it never grows."""
        return prompt_room(self.max_mixed_tokens, num_decodes) if num_decodes else self.max_num_batched_tokens

    def buckets(self, num_decodes: int) -> tuple[int, ...]:
        """Sizes of steps in which so many requests decode."""
        if num_decodes:
            return mixed_buckets(self.max_mixed_tokens)
        return prefill_buckets(self.max_num_batched_tokens, also=None if self.store is None else self.store.cell)

    @property
    def max_tokens_in_pool(self) -> int:
        """Tokens of a single request that fill the pool."""
        return self.num_free_entries // self.entries_per_page_column * self.page_size

    @property
    def pool(self) -> Pool:
        """The empty pool."""
        return Pool(self.num_free_entries, self.entries_per_page_column, self.page_size)

    @property
    def least_prompt_room(self) -> int:
        """Prompt tokens for which every step has room, whoever decodes beside them."""
        return min(prompt_room(self.max_mixed_tokens, self.max_num_seqs), self.max_num_batched_tokens)
