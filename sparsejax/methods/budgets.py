"""Budget rules: given scores, how many slots each layer and head keeps, and so which.

A budget of n tokens means n slots per layer and KV head on average. Protected tokens are paid from it. A rule whose
budget covers what is live keeps all of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.errors import InvalidArgumentError, pick
from sparsejax.methods.protection import priorities
from sparsejax.methods.select import top_slots
from sparsejax.methods.slots import Slots
from sparsejax.validation import number


@dataclass(frozen=True)
class BudgetRule:
    """Base of all budget rules. A subclass's dataclass fields are its options.

    Class variables:
      name: what `CompressionParams(budget_rule=...)` calls it.
      summary: one line.
      source: the paper.
      equal_heads: gives all heads of a layer the same number of tokens, so that equal scores keep equal tokens.
      equal_layers: likewise for all layers.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""
    equal_heads: ClassVar[bool] = False
    equal_layers: ClassVar[bool] = False

    def check_layers(self, num_layers: int) -> None:
        """Raises if the rule does not fit a model of so many layers.

        Raises:
          InvalidArgumentError: an option is about another number of layers.
        """

    def keep(self, scores: jax.Array, slots: Slots, budget: jax.Array) -> jax.Array:
        """bool[L, K, H, S]: which slots to keep.

        Every protected slot is kept, even if the budget is smaller. The choice depends on scores and positions only,
        not on the order of the slots nor on the other rows.

        Args:
          scores: f32[L, K, H, S], from `Method.scores`.
          slots: the view they belong to.
          budget: i32[K], tokens to keep per layer and head, on average.
        """
        raise NotImplementedError

    def max_entries(self, budget: int, text_length: int, *, num_layers: int, num_kv_heads: int, page_size: int) -> int:
        """Most pages that a row can hold after `keep`, over all layers and heads.

        Args:
          budget: tokens per layer and head, at least the protected ones.
          text_length: most tokens that a head holds before.
        """
        heads = num_layers * num_kv_heads
        # Each head wastes less than a page.
        pooled = (heads * budget + heads * (page_size - 1)) // page_size
        return min(pooled, heads * -(-text_length // page_size))

    def most_kept(self, budget: int, *, page_size: int) -> int:
        """Most tokens per layer and head, on average, that a row can hold after `keep` with this budget."""
        del page_size
        return budget

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Names of the rule's own options."""
        return tuple(field.name for field in dataclasses.fields(cls))


_RULES: dict[str, type[BudgetRule]] = {}

_AnyRule = TypeVar("_AnyRule", bound=type[BudgetRule])


def register_rule(rule: _AnyRule) -> _AnyRule:
    """Class decorator: makes a budget rule available under its `name`.

    Raises:
      InvalidArgumentError: another class has the name.
    """
    known = _RULES.get(rule.name)
    if known is not None and (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
        raise InvalidArgumentError(
            f"a budget rule named {rule.name!r} exists: {known.__module__}.{known.__qualname__}."
        )
    _RULES[rule.name] = rule
    return rule


def available_rules() -> tuple[str, ...]:
    """Names that `CompressionParams(budget_rule=...)` accepts."""
    return tuple(_RULES)


def get_rule(name: str) -> type[BudgetRule]:
    """The dataclass registered under `name`.

    Raises:
      UnknownArgumentError: no such rule; the message lists those that exist.
    """
    return pick("budget_rule", name, _RULES, _RULES)


@register_rule
@dataclass(frozen=True)
class Uniform(BudgetRule):
    """Every head of every layer keeps its own best `budget` slots."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "The same number of tokens in every layer and head."
    equal_heads: ClassVar[bool] = True
    equal_layers: ClassVar[bool] = True

    def keep(self, scores: jax.Array, slots: Slots, budget: jax.Array) -> jax.Array:
        count = jnp.maximum(budget[None, :, None], _count(slots.protected))
        return top_slots(priorities(scores, slots.live, slots.protected), slots.position, count)

    def max_entries(self, budget: int, text_length: int, *, num_layers: int, num_kv_heads: int, page_size: int) -> int:
        return num_layers * num_kv_heads * -(-min(budget, text_length) // page_size)


@register_rule
@dataclass(frozen=True)
class Pyramid(BudgetRule):
    """Lower layers keep more: budgets fall linearly from the first layer to the last, with the total of `uniform`.

    What a layer cannot use (it holds fewer tokens) or must have (its protected tokens) is settled with the others in
    proportion to their shares, so the total stays exact.

    Attributes:
      beta: the last layer gets 1 / beta of the mean, the first 2 - 1 / beta of it; at least 1. The published code's 20.
      layer_ratios: the layers' shares instead, positive, one a layer, first to last; only their proportions count.
    """

    name: ClassVar[str] = "pyramid"
    summary: ClassVar[str] = "More tokens in lower layers, linearly; the same number in all heads of a layer."
    source: ClassVar[str] = "Cai et al. 2024, PyramidKV, arXiv:2406.02069, section 3.2"
    equal_heads: ClassVar[bool] = True

    beta: float = 20.0
    layer_ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", number("beta", self.beta, 1.0))
        if self.layer_ratios is not None:
            if isinstance(self.layer_ratios, str) or not isinstance(self.layer_ratios, Sequence | np.ndarray):
                raise InvalidArgumentError(f"layer_ratios must be a list of numbers, got {self.layer_ratios!r}.")
            ratios = tuple(number("layer_ratios", ratio, 0.0, above=True) for ratio in self.layer_ratios)
            if not ratios:
                raise InvalidArgumentError("layer_ratios must have one number a layer, got an empty list.")
            object.__setattr__(self, "layer_ratios", ratios)

    def check_layers(self, num_layers: int) -> None:
        self.shares(num_layers)

    def shares(self, num_layers: int) -> np.ndarray:
        """f32[L]: what each layer gets of the mean budget; the mean is 1.

        Raises:
          InvalidArgumentError: layer_ratios has another length.
        """
        if self.layer_ratios is None:
            shares = np.linspace(2.0 - 1.0 / self.beta, 1.0 / self.beta, num_layers) if num_layers > 1 else np.ones(1)
        elif len(self.layer_ratios) != num_layers:
            raise InvalidArgumentError(
                f"layer_ratios must have one number for each of the model's {num_layers} layers, "
                f"got {len(self.layer_ratios)}."
            )
        else:
            shares = np.asarray(self.layer_ratios)
        return (shares / shares.mean()).astype(np.float32)

    def layer_budgets(self, lowest: jax.Array, highest: jax.Array, budget: jax.Array) -> jax.Array:
        """i32[L, K]: tokens of each head of each layer; their sum is L * budget, as far as the bounds let it.

        Args:
          lowest: i32[L, K], what each layer must have.
          highest: i32[L, K], what it can use, at least `lowest`.
          budget: i32[K].
        """
        num_layers = lowest.shape[0]
        shares = jnp.asarray(self.shares(num_layers))[:, None]
        highest = jnp.maximum(lowest, jnp.minimum(highest, self._most(num_layers, budget)))
        # No layer keeps more than its row holds, so the cap changes nothing but keeps the sum in 32 bits.
        total = num_layers * jnp.minimum(budget, jnp.max(highest, axis=0))
        total = jnp.clip(total, jnp.sum(lowest, axis=0), jnp.sum(highest, axis=0))

        def tokens(level: jax.Array) -> jax.Array:
            given = jnp.minimum(jnp.floor(shares * level), highest.astype(jnp.float32))
            return jnp.maximum(given.astype(jnp.int32), lowest)

        def refine(step: jax.Array, bits: jax.Array) -> jax.Array:
            trial = bits | (np.uint32(1) << (30 - step).astype(jnp.uint32))
            level = jax.lax.bitcast_convert_type(trial, jnp.float32)
            fits = jnp.isfinite(level) & (jnp.sum(tokens(level), axis=0) <= total)
            return jnp.where(fits, trial, bits)

        # The highest level that fits, bit by bit: positive floats are ordered as their bits are.
        bits = jax.lax.fori_loop(0, 31, refine, jnp.zeros(total.shape, jnp.uint32))
        given = tokens(jax.lax.bitcast_convert_type(bits, jnp.float32))
        # One more bit would give one more token to several layers at once; the first of them get what is left.
        room = given < highest
        rank = jnp.cumsum(room, axis=0) - room
        return given + (room & (rank < total - jnp.sum(given, axis=0)))

    def keep(self, scores: jax.Array, slots: Slots, budget: jax.Array) -> jax.Array:
        lowest = jnp.max(_count(slots.protected), axis=2)  # [L, K]
        highest = jnp.max(_count(slots.live), axis=2)
        count = self.layer_budgets(lowest, highest, budget)[:, :, None]
        return top_slots(priorities(scores, slots.live, slots.protected), slots.position, count)

    def _most(self, num_layers: int, budget: jax.Array) -> jax.Array:
        """i32[K]: what the layer with the largest share gets."""
        most = jnp.ceil(float(self.shares(num_layers).max()) * jnp.minimum(budget, 2**24).astype(jnp.float32))
        return most.astype(jnp.int32)


@register_rule
@dataclass(frozen=True)
class Adaptive(BudgetRule):
    """The heads of a layer share one budget: the best slots of all of them, but each head its best `floor` first.

    Attributes:
      floor: share of the mean budget that every head gets, in [0, 1]. AdaKV's safeguard, 0.2 there.
    """

    name: ClassVar[str] = "adaptive"
    summary: ClassVar[str] = "One budget for the heads of a layer, with a floor for each head."
    source: ClassVar[str] = "Feng et al. 2024, Ada-KV, arXiv:2407.11550, section 4"

    floor: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "floor", number("budget_floor", self.floor, 0.0, 1.0))

    def keep(self, scores: jax.Array, slots: Slots, budget: jax.Array) -> jax.Array:
        return _pooled(scores, slots, budget, self.floor, axes=(2,))


@register_rule
@dataclass(frozen=True)
class Layer(BudgetRule):
    """The heads of a layer share one budget, with no floor: a head may keep nothing but its protected tokens."""

    name: ClassVar[str] = "layer"
    summary: ClassVar[str] = "One budget for the heads of a layer."
    source: ClassVar[str] = "Chari and Van Durme 2025, Compactor, arXiv:2507.08143"

    def keep(self, scores: jax.Array, slots: Slots, budget: jax.Array) -> jax.Array:
        return _pooled(scores, slots, budget, 0.0, axes=(2,))


@register_rule
@dataclass(frozen=True)
class Global(BudgetRule):
    """All layers and heads share one budget: the best slots of all of them, but each head its best `floor` first.

    Scores of different layers are compared as they are, so the scorer must give them one scale.

    Attributes:
      floor: share of the mean budget that every head of every layer gets, in [0, 1].
    """

    name: ClassVar[str] = "global"
    summary: ClassVar[str] = "One budget for all layers and heads."

    floor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "floor", number("budget_floor", self.floor, 0.0, 1.0))

    def keep(self, scores: jax.Array, slots: Slots, budget: jax.Array) -> jax.Array:
        return _pooled(scores, slots, budget, self.floor, axes=(0, 2))


def _pooled(scores: jax.Array, slots: Slots, budget: jax.Array, floor: float, *, axes: tuple[int, ...]) -> jax.Array:
    """bool[L, K, H, S]: the best slots, one budget for all that lie along `axes` (layers 0, heads 2)."""
    priority = priorities(scores, slots.live, slots.protected)
    # More than a head can hold is as good as all of it, and keeps the product below in 32 bits.
    budget = jnp.minimum(budget, slots.live.shape[3])[None, :, None]  # [1, K, 1]
    least = jnp.maximum(_count(slots.protected), share_of(budget, floor))
    first = top_slots(priority, slots.position, least)
    lanes = math.prod(slots.live.shape[axis] for axis in axes)
    total = jnp.maximum(lanes * budget, jnp.sum(_count(first), axis=axes, keepdims=True))
    # Equal scores go to the newer token, then to the later layer and head.
    lane = jnp.arange(lanes, dtype=jnp.uint32).reshape(
        [slots.live.shape[axis] if axis in axes else 1 for axis in range(3)]
    )
    tie = slots.position.astype(jnp.uint32) * np.uint32(lanes) + lane[..., None]
    return top_slots(jnp.where(first, jnp.inf, priority), tie, jnp.squeeze(total, axes), axes=(*axes, 3))


def share_of(count: jax.Array, share: float) -> jax.Array:
    """i32: `share`, in [0, 1], of each i32 count, rounded down.

    Of the share as it is written, to a ten thousandth: 0.53 of 100 are 53, where the product of floats is less.
    """
    part, whole = Fraction(repr(float(share))).limit_denominator(10_000).as_integer_ratio()
    return count // whole * part + count % whole * part // whole  # all of it below 2^31


def _count(marks: jax.Array) -> jax.Array:
    """i32: marked slots of each head."""
    return jnp.sum(marks, axis=-1, dtype=jnp.int32)
