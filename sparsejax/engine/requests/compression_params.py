"""What a request asks for its KV cache: a method, a budget, what is protected, and when to compress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from sparsejax import methods
from sparsejax.errors import InvalidArgumentError, UnknownArgumentError, nearest
from sparsejax.methods.budgets import BudgetRule
from sparsejax.validation import choice, flag, number, whole

STRATEGIES = ("reuse", "free_block", "sparse_copy", "no_op")
DEFAULT_STRATEGY = "reuse"
DEFAULT_INTERVAL_TOKENS = 128

# What methods that keep everything have a use for, by family.
_TAKEN_BY = {
    "full": frozenset[str](),
    "select": frozenset({"sink_tokens", "recent_tokens", "context_tokens", "options"}),
    "store": frozenset({"context_tokens", "options"}),
}
_ALIASES = {"max_cache_tokens": "budget_tokens", "protected_window_size": "recent_tokens"}


@dataclass(frozen=True, init=False)
class CompressionParams:
    """What is kept of a request's KV cache.

    Attributes:
      method: name of a method in `sparsejax.methods`; "full" keeps everything, and takes no other argument. Methods
        that select keep everything, too; they take sink_tokens, recent_tokens, context_tokens and options. What stores
        tokens compressed (deltakv) takes context_tokens and options.
      budget_tokens: tokens to keep per layer and KV head, on average, protected ones included. Also called
        max_cache_tokens. A prompt of at most this many tokens is left as it is.
      keep_fraction: the budget as a fraction of the text that is compressed, in (0, 1]; at least what is protected.
        Methods that evict need exactly one of the two.
      sink_tokens: first tokens of the text that are kept (or read) whatever their score. None: the method's default.
      recent_tokens: last tokens likewise. Also called protected_window_size. None: the method's default.
      window_tokens: observation window, the last queries of the text that a query-aware method looks at. None: the
        method's default.
      compress_once: compress the prompt only. False: go on while decoding, at every step if the method evicts per step
        and `interval_tokens` is not given, else every `interval_tokens`. None: the method's default.
      context_tokens: compress after this many tokens of the prompt, before the rest (the question) is seen. None: after
        the whole prompt. Methods that select or store compressed compute so many tokens with dense attention, and then
        decode the rest of the prompt token by token.
      interval_tokens: generated tokens between two compressions. None: 128, where it is needed.
      strategy: what evicting at every step does with memory. "reuse" (None means this): the next token takes the
        victim's slot; "free_block": pages are freed once all their tokens are evicted; "sparse_copy": survivors move to
        fresh pages; "no_op": nothing is freed. All of them attend to the same tokens.
      num_per_evict: tokens evicted at once when a step exceeds the budget; fewer, larger evictions. None: 1.
      budget_rule: how the budget is shared among layers and heads, a name in `sparsejax.methods.budgets`. None: the
        method's default.
      budget_floor: share of the mean budget that every head gets, for the rules that have a floor.
      options: the method's and the budget rule's own options, in any order. They are given as keywords, e.g.
        `CompressionParams(method="snapkv", budget_tokens=1024, pooling="avg")`, and kept sorted by name.

    Raises:
      InvalidArgumentError: a value that is not allowed, or that has no meaning for the method.
      UnknownArgumentError: a method, a budget rule or an argument that does not exist.
    """

    method: str = "full"
    budget_tokens: int | None = None
    keep_fraction: float | None = None
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    window_tokens: int | None = None
    compress_once: bool | None = None
    context_tokens: int | None = None
    interval_tokens: int | None = None
    strategy: str | None = None
    num_per_evict: int | None = None
    budget_rule: str | None = None
    budget_floor: float | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __init__(
        self,
        *,
        method: str = "full",
        budget_tokens: int | None = None,
        keep_fraction: float | None = None,
        sink_tokens: int | None = None,
        recent_tokens: int | None = None,
        window_tokens: int | None = None,
        compress_once: bool | None = None,
        context_tokens: int | None = None,
        interval_tokens: int | None = None,
        strategy: str | None = None,
        num_per_evict: int | None = None,
        budget_rule: str | None = None,
        budget_floor: float | None = None,
        options: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        **keywords: Any,
    ) -> None:
        given: dict[str, Any] = {
            "method": method,
            "budget_tokens": budget_tokens,
            "keep_fraction": keep_fraction,
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
            "window_tokens": window_tokens,
            "compress_once": compress_once,
            "context_tokens": context_tokens,
            "interval_tokens": interval_tokens,
            "strategy": strategy,
            "num_per_evict": num_per_evict,
            "budget_rule": budget_rule,
            "budget_floor": budget_floor,
        }
        for alias, name in _ALIASES.items():
            if alias in keywords:
                value = keywords.pop(alias)
                if given[name] is not None:
                    raise InvalidArgumentError(f"{alias} is another name of {name}; give one of them.")
                given[name] = value
        policy = methods.get(method)
        rule = methods.get_rule(policy.default_budget_rule if budget_rule is None else budget_rule)
        own = _pairs(options)
        for name in keywords:
            if name in own:
                raise InvalidArgumentError(f"{name} is given twice, in options and by name; give one of them.")
        own |= keywords
        for name in own:
            if name in given or name in _ALIASES:
                raise InvalidArgumentError(
                    f"{name} is no option of a method or a rule: give it by name, not in options."
                )
            if name not in _own_options(policy, rule):
                raise _unknown_option(name, [*given, *_ALIASES], policy, rule)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "options", tuple(sorted(own.items())))
        self._normalise()
        self._check_meaning()
        # Options as the method and the rule normalised them, so that equal requests are equal and hashable.
        normal = [(name, getattr(self.policy if name in policy.option_names() else self.rule, name)) for name in own]
        object.__setattr__(self, "options", tuple(sorted(normal)))

    @cached_property
    def policy(self) -> methods.Method:
        """The method with its options."""
        cls = methods.get(self.method)
        return cls(**{name: value for name, value in self.options if name in cls.option_names()})

    @cached_property
    def rule(self) -> BudgetRule:
        """The budget rule with its options."""
        policy = methods.get(self.method)
        cls = methods.get_rule(policy.default_budget_rule if self.budget_rule is None else self.budget_rule)
        taken = policy.option_names()
        own = {name: value for name, value in self.options if name in cls.option_names() and name not in taken}
        if self.budget_floor is not None:
            own["floor"] = self.budget_floor
        return cls(**own)

    @cached_property
    def evicts(self) -> bool:
        """Whether anything is ever dropped."""
        return self.policy.family == "evict"

    @property
    def compresses(self) -> bool:
        """Whether tokens are stored compressed, and so read back as something else."""
        return self.policy.family == "store"

    @property
    def selects(self) -> bool:
        """Whether decoding reads a part of what is kept."""
        return self.policy.family == "select"

    @property
    def decodes_again(self) -> bool:
        """Whether K and V of decoded tokens depend on more than the text, so that a replay must decode them again."""
        return self.selects or self.compresses

    def prefilled(self, prompt_length: int) -> int:
        """Tokens of a prompt that are computed at once; those behind them are decoded one by one."""
        if not self.decodes_again or self.context_tokens is None:
            return prompt_length
        return min(self.context_tokens, prompt_length)

    @cached_property
    def sinks(self) -> int:
        """First tokens that are protected."""
        return self.policy.default_sink_tokens if self.sink_tokens is None else self.sink_tokens

    @cached_property
    def window(self) -> int:
        """Queries of the observation window; 0: the method has none, or looks at all queries."""
        return self.policy.default_window_tokens if self.window_tokens is None else self.window_tokens

    def budget(self, text_length: int) -> int:
        """Tokens to keep per layer and KV head, on average, of a text of `text_length` tokens."""
        if not self.evicts:
            return text_length
        if self.budget_tokens is not None:
            return self.budget_tokens
        part, whole = self._keep_ratio
        return max(-(-text_length * part // whole), self.sinks + self._least_recent, 1)

    @cached_property
    def _keep_ratio(self) -> tuple[int, int]:
        """`keep_fraction` as it is written: 0.07 of 100 tokens are 7, where the product of floats is more than 7."""
        assert self.keep_fraction is not None
        return Fraction(repr(self.keep_fraction)).as_integer_ratio()

    def recent(self, text_length: int) -> int:
        """Last tokens that are protected in a text of `text_length` tokens."""
        if self._recent_of_any is not None:
            return self._recent_of_any
        return self._recent_of(self.budget(text_length))

    @cached_property
    def _recent_of_any(self) -> int | None:
        """What `recent` is for every text; None: it differs. Asked for each row at every step that evicts."""
        if self.recent_tokens is not None:
            return self._least_recent
        return self._recent_of(self.budget_tokens) if self.evicts and self.budget_tokens is not None else None

    def _recent_of(self, budget: int) -> int:
        return min(self.policy.default_recent_tokens(budget, self.window), max(budget - self.sinks, 0))

    @property
    def recent_window(self) -> int:
        """Last tokens that selection always reads."""
        return self.policy.default_recent_tokens(0, 0) if self.recent_tokens is None else self.recent_tokens

    def record_from(self, text_length: int) -> int:
        """Position of the first query whose attention is recorded; `text_length` if none is."""
        return self.policy.record_from(text_length, self.window) if self.policy.power else text_length

    @cached_property
    def once(self) -> bool:
        """Whether only the prompt is compressed."""
        if not self.evicts:
            return True
        if self.compress_once is not None:
            return self.compress_once
        return self.policy.default_compress_once and self.interval_tokens is None

    @cached_property
    def per_step(self) -> bool:
        """Whether every decode step over budget evicts."""
        return self.evicts and not self.once and self.policy.evicts_per_step and self.interval_tokens is None

    @cached_property
    def interval(self) -> int | None:
        """Generated tokens between two compressions, or None if there is but one, or eviction per step."""
        if self.once or self.per_step:
            return None
        return DEFAULT_INTERVAL_TOKENS if self.interval_tokens is None else self.interval_tokens

    @property
    def evict_strategy(self) -> str:
        """What evicting at every step does with memory."""
        return DEFAULT_STRATEGY if self.strategy is None else self.strategy

    @property
    def evict_count(self) -> int:
        """Tokens evicted when a step exceeds the budget."""
        return 1 if self.num_per_evict is None else self.num_per_evict

    def most_evicted(self, text_length: int) -> int:
        """Tokens of a text of `text_length` tokens that a step over budget, by one, has to choose from."""
        return self.budget(text_length) + 1 - self.sinks - self.recent(text_length)

    @cached_property
    def _least_recent(self) -> int:
        """Recent tokens that are protected whatever the budget is."""
        window = self.window if self.policy.protects_window else 0
        return max(self.recent_tokens or 0, window)

    def _normalise(self) -> None:
        """Checks every value by itself."""
        lowest = {"budget_tokens": 1, "context_tokens": 1, "interval_tokens": 1, "num_per_evict": 1}
        for name in (*lowest, "sink_tokens", "recent_tokens", "window_tokens"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole(name, value, lowest.get(name, 0)))
        if self.keep_fraction is not None:
            object.__setattr__(self, "keep_fraction", number("keep_fraction", self.keep_fraction, 0.0, 1.0, above=True))
        if self.budget_floor is not None:
            object.__setattr__(self, "budget_floor", number("budget_floor", self.budget_floor, 0.0, 1.0))
        if self.compress_once is not None:
            flag("compress_once", self.compress_once)
        if self.strategy is not None:
            choice("strategy", self.strategy, STRATEGIES)

    def _check_meaning(self) -> None:
        """Refuses what would be ignored, and combinations that cannot hold."""
        policy = methods.get(self.method)
        if not self.evicts:
            self._check_keeps_everything()
            return
        if (self.budget_tokens is None) == (self.keep_fraction is None):
            got = "neither" if self.budget_tokens is None else "both"
            raise InvalidArgumentError(
                f"method {self.method!r} needs exactly one of budget_tokens (a number of tokens) and keep_fraction "
                f"(in (0, 1]); got {got}."
            )
        rule = methods.get_rule(self.budget_rule or policy.default_budget_rule)
        if self.budget_floor is not None and "floor" not in rule.option_names():
            floors = [name for name in methods.available_rules() if "floor" in methods.get_rule(name).option_names()]
            raise InvalidArgumentError(
                f"budget_floor has no meaning for budget_rule {rule.name!r}; rules with a floor: "
                f"{', '.join(map(repr, floors))}."
            )
        self._check_window(policy)
        self._check_times(policy)
        self._check_rule()
        if self.budget_tokens is not None:
            self._check_budget(self.budget_tokens)

    def _check_keeps_everything(self) -> None:
        """Refuses what only evicting has a use for."""
        taken, hint = {"method"}, ""
        if self.decodes_again:
            taken |= _TAKEN_BY[self.policy.family]
            hint = " How much is read is top_tokens, a number or a fraction."
            for name, _ in self.options:
                if name not in methods.get(self.method).option_names():
                    raise InvalidArgumentError(f"method {self.method!r} has no budget rule; it takes no {name}.")
        for name in self.__dataclass_fields__:
            if name not in taken and getattr(self, name) not in (None, ()):
                raise InvalidArgumentError(f"method {self.method!r} keeps everything; it takes no {name}.{hint}")

    def _check_window(self, policy: type[methods.Method]) -> None:
        if self.window_tokens is None:
            return
        if not policy.default_window_tokens:
            raise InvalidArgumentError(f"method {self.method!r} has no observation window; it takes no window_tokens.")
        if policy.protects_window and self.window_tokens < 1:
            raise InvalidArgumentError(f"window_tokens must be a whole number of at least 1, got {self.window_tokens}.")

    def _check_times(self, policy: type[methods.Method]) -> None:
        if self.once and self.interval_tokens is not None:
            raise InvalidArgumentError("interval_tokens has no meaning with compress_once=True; give one of them.")
        if not self.once and not policy.scores_decoded_tokens():
            raise InvalidArgumentError(
                f"method {self.method!r} cannot score generated tokens, so it compresses once: leave compress_once and "
                "interval_tokens out."
            )
        for name in ("strategy", "num_per_evict"):
            if getattr(self, name) is not None and not self.per_step:
                stepping = [each for each in methods.available() if methods.get(each).evicts_per_step]
                raise InvalidArgumentError(
                    f"{name} has a meaning only where every decode step evicts: method "
                    f"{' or '.join(map(repr, stepping))}, with neither compress_once=True nor interval_tokens."
                )

    def _check_rule(self) -> None:
        rule, policy = self.rule, self.policy
        if (policy.equal_heads and not rule.equal_heads) or (policy.equal_layers and not rule.equal_layers):
            unit = "layers and heads" if policy.equal_layers else "heads of a layer"
            raise InvalidArgumentError(
                f"budget_rule {rule.name!r} gives {unit} different budgets, but method {self.method!r} keeps the same "
                "tokens in all of them; use budget_rule 'uniform'."
            )
        if self.per_step and not (rule.equal_heads and rule.equal_layers):
            raise InvalidArgumentError(
                f"budget_rule {rule.name!r} cannot evict at every step; use 'uniform', or compress_once=True, or "
                "interval_tokens."
            )

    def _check_budget(self, budget: int) -> None:
        looks_at_all = self.policy.power > 0 and self.policy.record_from(budget + self.window, self.window) == 0
        if self.window > budget and not looks_at_all:
            raise InvalidArgumentError(f"window_tokens ({self.window}) must be at most budget_tokens ({budget}).")
        protected = self.sinks + self._least_recent
        if protected > budget:
            raise InvalidArgumentError(
                f"sink_tokens ({self.sinks}) and recent_tokens ({self._least_recent}, an observation window that is "
                f"always kept included) must together be at most budget_tokens ({budget})."
            )
        most = self.most_evicted(budget)
        if self.evict_count > most:
            raise InvalidArgumentError(
                f"num_per_evict must be at most {most}, the tokens that are not protected when one exceeds the budget; "
                f"got {self.evict_count}."
            )


def _own_options(policy: type[methods.Method], rule: type[BudgetRule]) -> set[str]:
    """Names that are valid beside the common arguments; the rule's floor is common, as budget_floor."""
    return {*policy.option_names(), *rule.option_names()} - {"floor"}


def _pairs(options: Any) -> dict[str, Any]:
    """`options` as a dictionary."""
    try:
        found = dict(options)
    except (TypeError, ValueError):
        found = None
    if found is None or not all(isinstance(name, str) for name in found):
        raise InvalidArgumentError(f"options must be a dictionary from names to values, got {options!r}.")
    return found


def _unknown_option(
    name: str, common: list[str], policy: type[methods.Method], rule: type[BudgetRule]
) -> UnknownArgumentError:
    own, whose = _own_options(policy, rule), f" with budget rule {rule.name!r}"
    if policy.family in _TAKEN_BY:  # no budget, and no rule
        common, own, whose = ["method", *(_TAKEN_BY[policy.family] - {"options"})], policy.option_names(), ""
    guess = nearest(name, [*common, *own])
    hint = f" Did you mean {guess!r}?" if guess else ""
    listed = ", ".join(sorted(own)) if own else "none"
    return UnknownArgumentError(
        f"CompressionParams has no argument {name!r}.{hint} Valid arguments: {', '.join(sorted(common))}; options of "
        f"method {policy.name!r}{whose}: {listed}."
    )
