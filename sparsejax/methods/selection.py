"""Selection: every token stays in the cache, and decoding reads some of them in some layers.

A selecting method says what each layer does (`LayerRoles`) and how many tokens are chosen. A layer that reads a part
reads the sinks, the chosen among the candidates, and the most recent tokens. Prompts are computed with dense attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sparsejax.errors import InvalidArgumentError
from sparsejax.methods.base import Family, Method
from sparsejax.validation import number, whole

LayerRole = Literal["all", "observe", "follow", "pages"]
"""What a layer does when it decodes: reads all tokens; reads all and chooses what the layers after it read; reads what
the last observation layer chose; or chooses pages for itself, by bounds of their keys."""

DEFAULT_TOP_TOKENS = 2048

ALL_TOKENS = 1 << 30
"""More than any text has; where 32 bits hold a number of tokens, larger ones become this."""


@dataclass(frozen=True)
class LayerRoles:
    """The role of every layer. Steps are compiled for it.

    Attributes:
      roles: one a layer.
    """

    roles: tuple[LayerRole, ...]

    @property
    def reads_all(self) -> int:
        """Layers that read every token."""
        return sum(role in ("all", "observe") for role in self.roles)


@dataclass(frozen=True)
class SelectionMethod(Method):
    """Base of the methods that select.

    Attributes:
      top_tokens: tokens to choose beside the sinks and the recent ones: a whole number, or a fraction in (0, 1) of the
        candidates, rounded up.
    """

    family: ClassVar[Family] = "select"
    default_sink_tokens: ClassVar[int] = 4
    recent_tokens: ClassVar[int] = 32

    top_tokens: int | float = DEFAULT_TOP_TOKENS

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_tokens", top_tokens(self.top_tokens))

    def default_recent_tokens(self, budget: int, window_tokens: int) -> int:
        del budget, window_tokens
        return self.recent_tokens

    def layer_roles(self, num_layers: int, full_layers: Sequence[int]) -> LayerRoles:
        """The roles of a model's layers.

        Args:
          num_layers: of the model.
          full_layers: the layers that read everything if the request does not say; known for the model, or a spread.

        Raises:
          InvalidArgumentError: the method's options do not fit the model.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no layer_roles.")


def top_tokens(value: Any) -> int | float:
    """`top_tokens` checked: a whole number of at least 1, or a fraction in (0, 1).

    Raises:
      InvalidArgumentError: it is neither.
    """
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return whole("top_tokens", value, 1)
    try:
        fraction = number("top_tokens", value, 0.0, 1.0, above=True)
    except InvalidArgumentError:
        fraction = 1.0
    if fraction == 1.0:
        raise InvalidArgumentError(
            f"top_tokens must be a whole number of at least 1, or a fraction in (0, 1), got {value!r}."
        )
    return fraction


def full_layers(value: Any) -> tuple[int, ...]:
    """`full_attention_layers` checked and sorted: layer numbers, or a text such as "0,1,8".

    Raises:
      InvalidArgumentError: no such list, or layer 0 is not in it.
    """
    name = "full_attention_layers"
    try:
        parts = value.split(",") if isinstance(value, str) else list(value)
        layers = sorted({whole(name, int(part) if isinstance(part, str) else part, 0) for part in parts})
    except (TypeError, ValueError):
        layers = []
    if not layers or layers[0] != 0:
        raise InvalidArgumentError(
            f"{name} must be layer numbers, layer 0 among them (nothing is chosen before it), got {value!r}."
        )
    return tuple(layers)


def follower_roles(layers: Sequence[int], num_layers: int) -> LayerRoles:
    """Observation layers are full layers whose next layer is not full; the layers after one follow it.

    Args:
      layers: the full-attention layers, ascending, from 0 on.

    Raises:
      InvalidArgumentError: the model has no such layer.
    """
    if layers[-1] >= num_layers:
        raise InvalidArgumentError(
            f"full_attention_layers has layer {layers[-1]}; this model's layers are 0 to {num_layers - 1}."
        )
    full = set(layers)

    def role(layer: int) -> LayerRole:
        if layer not in full:
            return "follow"
        return "observe" if layer + 1 < num_layers and layer + 1 not in full else "all"

    return LayerRoles(tuple(role(layer) for layer in range(num_layers)))


def candidates(length: Any, sinks: Any, recent: Any) -> tuple[Any, Any]:
    """(first, last): the slots first .. last-1 of a text are those among which is chosen; int arrays of NumPy or JAX.

    Args:
      length: tokens of the text, the newest included.
      sinks, recent: tokens at its start and its end that are always read.
    """
    first = length.clip(max=sinks)
    return first, (length - recent).clip(min=first)


def chosen_count(num_candidates: Any, count: Any, fraction: Any) -> Any:
    """How many of the candidates are chosen; int arrays of NumPy or JAX.

    Args:
      count, fraction: `top_tokens` as a number of tokens, or float32 as a fraction; the other one is 0.
    """
    part = -(-(num_candidates.astype("float32") * fraction) // 1)
    return (count + part.astype("int32")).clip(max=num_candidates)


def candidate_pages(first: Any, last: Any, page_size: int) -> tuple[Any, Any]:
    """(first, last): the pages first .. last-1 lie among the candidates; int arrays of NumPy or JAX.

    Args:
      first, last: of `candidates`. A page that holds another token too is always read.
    """
    first_page = -(-first // page_size)
    return first_page, (last // page_size).clip(min=first_page)


def chosen_pages(num_pages: Any, count: Any, page_size: int) -> Any:
    """How many of the candidate pages are chosen for `count` tokens; int arrays of NumPy or JAX."""
    return (-(-count // page_size)).clip(max=num_pages)
