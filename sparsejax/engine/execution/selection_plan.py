"""Host side of selection: which layers of a request read what, and which compiled step serves a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import numpy as np

from sparsejax.engine.programs.selection import READS_ALL, RowSelection, Selecting, no_selection
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Chunk
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import LayerRoles, SelectionMethod
from sparsejax.methods.known_layers import known_layers, spread_layers
from sparsejax.methods.selection import ALL_TOKENS, candidate_pages, candidates, chosen_count, chosen_pages
from sparsejax.models import ModelConfig

SMALLEST_WIDTH = 1024
MOST_CHOICES = 16  # of layers that read all, in one engine: steps are compiled for each, and for all of them together
WIDTH_STEP = 8  # what is too wide costs next to nothing, for work follows what is read


def view_widths(max_slots: int) -> tuple[int, ...]:
    """Bounds on the tokens that a selecting layer reads of a request, ascending; each is a variant of the steps."""
    widths = [max_slots]
    while widths[0] >= WIDTH_STEP * SMALLEST_WIDTH:
        widths.insert(0, -(-widths[0] // WIDTH_STEP))
    return tuple(widths)


class Selections:
    """Knows the roles of each request's layers, and gives them numbers.

    Args:
      config: the model.
      max_slots: most tokens of a row.
      page_size: of the cache.
    """

    def __init__(self, config: ModelConfig, *, max_slots: int, page_size: int) -> None:
        self._config = config
        self._page_size = page_size
        self._widths = view_widths(max_slots)
        known = known_layers(config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads)
        self.full_layers = spread_layers(config.num_layers) if known is None else known.layers
        self._numbers: dict[LayerRoles, int] = {}

    def roles_of(self, compression: CompressionParams) -> LayerRoles:
        """The roles of the model's layers.

        Raises:
          InvalidArgumentError: they do not fit the model.
        """
        policy = compression.policy
        assert isinstance(policy, SelectionMethod), "only requests that select have roles"
        return policy.layer_roles(self._config.num_layers, self.full_layers)

    def check(self, *several: CompressionParams) -> None:
        """Raises unless requests may ask for these.

        Raises:
          InvalidArgumentError: the roles do not fit the model, or are more than an engine serves.
        """
        choices = set(self._numbers)
        for compression in several:
            choices.add(self.roles_of(compression))
            if len(choices) > MOST_CHOICES:
                raise InvalidArgumentError(
                    f"requests of one engine may make at most {MOST_CHOICES} different choices of the layers that read "
                    f"everything, as steps are compiled for each; method {compression.method!r} would be one more."
                )

    def take(self, compression: CompressionParams) -> None:
        """Counts what a request asks for, as `check` does not."""
        self.check(compression)
        self._number(self.roles_of(compression))

    def defaults(self, names: Iterable[str]) -> list[CompressionParams]:
        """What requests for these methods ask for if they say no more; without methods whose defaults do not fit."""
        found = []
        for name in names:
            with contextlib.suppress(InvalidArgumentError):
                self.roles_of(CompressionParams(method=name))
                found.append(CompressionParams(method=name))
        return found

    def of_chunks(self, chunks: Sequence[Chunk], segments: int) -> RowSelection:
        """What the chunks' requests ask for, padded to so many segments."""
        lanes = no_selection(segments)
        for i, chunk in enumerate(chunks):
            compression = chunk.request.compression
            if not compression.selects:
                continue
            lanes.roles[i] = self._number(self.roles_of(compression))
            lanes.sinks[i], lanes.recent[i], lanes.count[i], lanes.fraction[i] = _asked(compression)
        return lanes

    def step_options(self, requests: Iterable[Request], *, mixed: bool) -> Selecting | None:
        """What serves the decodes of a step; None if all read everything.

        Args:
          mixed: the step has a chunk too; these come in the widest variant only.
        """
        # Asked every step: requests of one call share their parameters, and what they read grows with their text.
        longest: dict[int, tuple[CompressionParams, int]] = {}
        reads_all = False
        for request in requests:
            compression = request.compression
            reads_all |= not compression.selects
            before = longest.get(id(compression), (compression, 0))[1]
            longest[id(compression)] = compression, max(before, request.num_computed)
        selecting = [each for each in longest.values() if each[0].selects]
        if not selecting:
            return None
        roles = {self.roles_of(compression) for compression, _ in selecting}
        if len(roles) > 1:
            # One step for all roles there are, rather than one for each combination of them.
            return self._options({*self._numbers, *roles}, everyone=False)
        if reads_all or mixed:
            return self._options(roles, everyone=False)
        needed = max(self._needed(*each) for each in selecting)
        return self._options(roles, width=next(width for width in self._widths if width >= needed))

    def warm_options(self, asked: Iterable[CompressionParams], *, mixed: bool, uniform: bool) -> list[Selecting | None]:
        """Everything that `step_options` gives while requests ask for nothing but `asked`, and for all to be read.

        Args:
          uniform: they all ask for the same.
        """
        roles = [self.roles_of(each) for each in asked]
        for each in roles:
            self._number(each)
        alike = [self._options([each], width=width) for each in roles for width in self._widths if not mixed]
        if uniform and not mixed:
            return [*alike]
        beside = [self._options([each], everyone=False) for each in roles]
        together = [self._options(self._numbers, everyone=False)] if len(roles) > 1 else []
        return list(dict.fromkeys([*alike, *beside, *together]))

    def read_tokens(self, compression: CompressionParams, lengths: np.ndarray) -> np.ndarray:
        """f64 like lengths: tokens of a text that decoding its newest one reads, mean over the layers.

        Args:
          lengths: i32, tokens of the text, the newest included.
        """
        roles = self.roles_of(compression)
        whole = roles.reads_all / len(roles.roles)
        return whole * lengths + (1 - whole) * self._read_by_layer(compression, roles, lengths)

    def _read_by_layer(self, compression: CompressionParams, roles: LayerRoles, lengths: np.ndarray) -> np.ndarray:
        """i32 like lengths: tokens that a layer which selects reads."""
        sinks, recent, count, fraction = _asked(compression)
        first, last = candidates(lengths, sinks, recent)
        chosen = chosen_count(last - first, np.int32(count), np.float32(fraction))
        if "pages" not in roles.roles:
            return lengths - (last - first) + chosen
        first, last = candidate_pages(first, last, self._page_size)
        passed = last - first - chosen_pages(last - first, chosen, self._page_size)
        return lengths - passed * self._page_size

    def _needed(self, compression: CompressionParams, length: int) -> int:
        """Tokens that a selecting layer reads of a text of `length` tokens, but for the rounding to pages."""
        sinks, recent, count, fraction = _asked(compression)
        first, last = candidates(np.asarray([length], np.int32), sinks, recent)
        chosen = chosen_count(last - first, np.int32(count), np.float32(fraction))
        return int(length - (last - first - chosen)[0])

    def _number(self, roles: LayerRoles) -> int:
        return self._numbers.setdefault(roles, READS_ALL + 1 + len(self._numbers))

    def _options(self, roles: Iterable[LayerRoles], *, width: int | None = None, everyone: bool = True) -> Selecting:
        numbered = tuple(sorted((self._number(each), each) for each in roles))
        return Selecting(numbered, width=width or self._widths[-1], everyone=everyone)


def _asked(compression: CompressionParams) -> tuple[int, int, int, float]:
    """(sinks, recent, count, fraction), as `RowSelection` has them. The newest token is always read.

    Numbers are bounded so as to fit 32 bits.
    """
    policy = compression.policy
    assert isinstance(policy, SelectionMethod)
    top = policy.top_tokens
    count, fraction = (top, 0.0) if isinstance(top, int) else (0, top)
    sinks, recent = compression.sinks, max(compression.recent_window, 1)
    return min(sinks, ALL_TOKENS), min(recent, ALL_TOKENS), min(count, ALL_TOKENS), fraction
