"""KVzip: what the model looks at while it repeats the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax

from sparsejax.methods.base import Method
from sparsejax.methods.registry import register
from sparsejax.methods.slots import Slots
from sparsejax.validation import whole

FIRST_INSTRUCTION = "\n\nRepeat the previous context exactly."
NEXT_INSTRUCTION = "\n\nRepeat the part of the previous context exactly, starting with"
"""What stands before the first part that is repeated, and before the others (the paper's prompts)."""


@dataclass(frozen=True)
class ReconstructionPass:
    """One forward pass behind the context: its tokens attend to the context and to each other, and are then forgotten.

    Attributes:
      tokens: instruction, lead-in and the repeated part of the context; they stand at the positions after it.
      start, stop: the repeated part: tokens start <= i < stop of the context.
    """

    tokens: tuple[int, ...]
    start: int
    stop: int


@register
@dataclass(frozen=True)
class KVzip(Method):
    """Largest attention probability that a slot gets from any query of the passes that repeat the context.

    The maximum is over the queries of all passes and the query heads of the group. The published code scores a part of
    the context from the pass that repeats it only, in a softmax over that part and the pass itself, to save time; here
    the softmax is the model's own, over the whole context, and every pass counts. That is the definition which the
    published code approximates. All layers and heads share one budget, as in the paper; it has no floor.

    The passes cost about as much as two prefills of the context (every token attends to all of it). Query-agnostic.

    Attributes:
      chunk_tokens: context tokens that a pass repeats.
      lead_in_tokens: last tokens of the part before, from which a pass goes on.
    """

    name: ClassVar[str] = "kvzip"
    summary: ClassVar[str] = "The most attention a token gets while the model repeats the context."
    source: ClassVar[str] = "Kim et al. 2025, KVzip, arXiv:2505.23416, section 3"
    records: ClassVar[frozenset[str]] = frozenset({"reconstruction"})
    default_budget_rule: ClassVar[str] = "global"
    default_sink_tokens: ClassVar[int] = 4

    chunk_tokens: int = 2048
    lead_in_tokens: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk_tokens", whole("chunk_tokens", self.chunk_tokens, 1))
        object.__setattr__(self, "lead_in_tokens", whole("lead_in_tokens", self.lead_in_tokens, 0))

    def scores(self, slots: Slots) -> jax.Array:
        return slots.score

    def reconstruction_passes(
        self,
        context: Sequence[int],
        *,
        first_instruction: Sequence[int] = (),
        next_instruction: Sequence[int] = (),
    ) -> list[ReconstructionPass]:
        """The passes that repeat `context` part by part.

        Args:
          context: token ids of the text that is compressed.
          first_instruction: token ids of FIRST_INSTRUCTION; empty if there is no tokenizer.
          next_instruction: token ids of NEXT_INSTRUCTION, likewise.
        """
        passes = []
        for start in range(0, len(context), self.chunk_tokens):
            stop = min(start + self.chunk_tokens, len(context))
            lead_in = context[max(start - self.lead_in_tokens, 0) : start]
            instruction = next_instruction if start else first_instruction
            passes.append(ReconstructionPass((*instruction, *lead_in, *context[start:stop]), start, stop))
        return passes
