"""`LLM`: the public face. A model, its tokenizer and an engine behind `generate`, `chat` and `stream`."""

from __future__ import annotations

import functools
import itertools
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from sparsejax import methods
from sparsejax.assets import tiny_compressor_path, tiny_model_path
from sparsejax.checkpoint import load_config, load_model, load_tokenizer, resolve
from sparsejax.config import EngineConfig
from sparsejax.engine.build import build_engine, check_methods, named_methods
from sparsejax.engine.build_store import load_store
from sparsejax.engine.engine import Engine
from sparsejax.engine.execution import memory
from sparsejax.engine.execution.garbage import quiet_collector
from sparsejax.engine.execution.selection_plan import Selections
from sparsejax.engine.requests import inputs
from sparsejax.engine.requests.blame import blamed_requests
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.inputs import Prompt, TokenizedPrompt
from sparsejax.engine.requests.outputs import RequestOutput
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.requests.submission import Submission
from sparsejax.engine.scheduling.limits import check_length
from sparsejax.errors import InvalidArgumentError
from sparsejax.models import ModelConfig

logger = logging.getLogger(__name__)

_Request = tuple[TokenizedPrompt, SamplingParams, CompressionParams]

SECONDS_BETWEEN_LOOKS = 0.1  # of a progress bar at requests that go on


class LLM:
    """A loaded model that generates.

        llm = LLM("Qwen/Qwen2.5-7B-Instruct")
        outputs = llm.generate(["Hello"], SamplingParams(temperature=0.0, max_tokens=64))
        print(outputs[0].outputs[0].text, outputs[0].metrics)

    Args:
      model: a Hugging Face folder or id, or a folder written by `sparsejax convert`. None: the embedded tiny model.
      **engine: fields of `sparsejax.config.EngineConfig`, by name.

    Raises:
      SparsejaxError: a bad argument, a missing or unsupported checkpoint, or no memory for the cache.
    """

    def __init__(self, model: str | Path | None = None, **engine: Any) -> None:
        config = EngineConfig.from_kwargs(**engine)
        if model is None and config.compressor is None:
            config = replace(config, compressor=tiny_compressor_path())
        memory.reserve_device_memory(config.gpu_memory_utilization)
        checkpoint = resolve(model if model is not None else tiny_model_path())
        load_config(checkpoint)  # a model that cannot run is refused before its tokenizer is looked at
        tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config.tokenizer or checkpoint.folder)
        dtype = config.dtype
        if dtype == "auto" and jax.default_backend() == "cpu":
            dtype = "float32"  # CPUs compute bfloat16 by converting it: slower and less exact
        with memory.explain_out_of_memory("loading the model's weights"):
            model_config, params = load_model(checkpoint.folder, dtype=None if dtype == "auto" else dtype)
        self._start(model_config, params, tokenizer, config, eos_token_ids(model_config, tokenizer))

    @classmethod
    def from_params(cls, model_config: ModelConfig, params: Any, *, tokenizer: Any = None, **engine: Any) -> LLM:
        """An LLM of parameters that are already on the device (their dtype is the compute dtype).

        Args:
          model_config: describes the params, see `sparsejax.models`.
          tokenizer: a transformers tokenizer; without one, prompts are token ids and outputs carry no text.
        """
        config = EngineConfig.from_kwargs(**engine)
        if config.dtype not in ("auto", params["embed"].dtype.name):
            raise InvalidArgumentError(
                f"dtype must be that of the params ({params['embed'].dtype.name}) or auto, got {config.dtype!r}: "
                "cast the params instead."
            )
        tokenizer = None if config.skip_tokenizer_init else tokenizer
        self = cls.__new__(cls)
        self._start(model_config, params, tokenizer, config, eos_token_ids(model_config, tokenizer))
        return self

    def _start(
        self,
        model_config: ModelConfig,
        params: Any,
        tokenizer: Any,
        config: EngineConfig,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.config = config
        self.model_config = model_config
        self._dtype = params["embed"].dtype
        self._tokenizer = tokenizer
        self._request_ids = itertools.count()
        self._build = functools.partial(
            build_engine, model_config, params, tokenizer, config, eos_token_ids=eos_token_ids
        )
        self._methods = frozenset({"full", *named_methods(config)})
        self.engine: Engine = self._build(methods=self._methods)

    def enable_methods(self, names: Sequence[str]) -> None:
        """Makes methods usable that the engine was not built for, by rebuilding its KV cache for them.

        `generate` and its like call this by themselves unless `methods` was given. The cache of a dense engine has one
        slot table for all layers and heads and no scores; eviction needs a table per head. What prefix caching kept is
        lost, and steps are compiled anew. Does nothing if all names are enabled.

        Args:
          names: of methods, those that `sparsejax methods` lists.

        Raises:
          InvalidArgumentError: unknown method, or requests are unfinished.
          OutOfMemoryError: no room for such a cache. The engine serves what it did before, then.
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InvalidArgumentError(f"names must be a list of methods, got {names!r}.")
        wanted = frozenset(names)
        for name in wanted:
            methods.get(name)
        if wanted <= self._methods:
            return
        check_methods(self._methods | wanted)
        if any(methods.get(name).family == "store" for name in wanted):
            load_store(self.model_config, self.config, dtype=self._dtype)  # refused before anything is given up
        if self.engine.num_unfinished:
            raise InvalidArgumentError(
                f"method {min(wanted - self._methods)!r} needs another layout of the KV cache, and requests are "
                "unfinished: name all methods in LLM(methods=...) to mix them."
            )
        enabled = self._methods | wanted
        logger.info("the KV cache is rebuilt for methods %s", ", ".join(sorted(enabled)))
        self.engine.drain()
        try:
            self.engine.close()  # there is no room for two pools
            engine = self._build(methods=enabled)
        except BaseException as error:  # an interrupt, too: what there was goes on serving what it did
            for each in (error, error.__context__):
                if each is not None:
                    traceback.clear_frames(each.__traceback__)  # which may hold the memory of the other
            self.engine.reopen()
            raise
        engine.num_added = self.engine.num_added  # or unseeded requests would draw what the first ones drew
        self.engine, self._methods = engine, enabled

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, or None with skip_tokenizer_init."""
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        compression_params: CompressionParams | Sequence[CompressionParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_output: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; requests are batched continuously.

        Args:
          prompts: str, list[str], list[int] (token ids of one prompt) or list[list[int]].
          sampling_params: one for all or one per prompt. Default: `SamplingParams()`.
          compression_params: one for all or one per prompt. Default: the engine's `default_compression`.
          use_tqdm: show a progress bar.
          on_output: called with the index of a prompt and its output as soon as it has ended, whichever ends first:
            what it was given is not lost if the call is interrupted or fails.

        Returns:
          One output per prompt, in order, with `.outputs[i].text`, `.token_ids`, `.finish_reason` and `.metrics`.

        Raises:
          InvalidArgumentError: a bad prompt or parameter; nothing has been run then.
          NotFiniteError: the model's logits are NaN or infinite.
        """
        prompts = inputs.as_prompts(prompts)
        tokenized = [
            inputs.tokenize(prompt, self._tokenizer, self.model_config.vocab_size, index=i)
            for i, prompt in enumerate(prompts)
        ]
        return self._run(tokenized, sampling_params, compression_params, use_tqdm, on_output)

    def chat(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        compression_params: CompressionParams | Sequence[CompressionParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_output: Callable[[int, RequestOutput], None] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: list[dict] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several through the model's chat template; otherwise as `generate`.

        Args:
          messages: a list of {"role": ..., "content": ...}, or a list of such lists.
          add_generation_prompt: end with what begins an answer of the model's.
          chat_template: a Jinja template instead of the tokenizer's own.
          tools: functions that the model may call, as JSON schemas; the template writes them down.
        """
        tokenized = [
            self._tokenize_chat(conversation, i, add_generation_prompt, chat_template, tools)
            for i, conversation in enumerate(inputs.as_conversations(messages))
        ]
        return self._run(tokenized, sampling_params, compression_params, use_tqdm, on_output)

    def stream(
        self,
        prompt: Prompt | Sequence[dict],
        sampling_params: SamplingParams | None = None,
        compression_params: CompressionParams | None = None,
    ) -> Iterator[RequestOutput]:
        """Generates one answer as an iterator of increments.

        Args:
          prompt: text, token ids, or one conversation (a list of messages).
          sampling_params: as in `generate`, with n = 1.

        Returns:
          Outputs whose `.outputs[0].text` and `.token_ids` hold only what is new; the last has `.finished` and the
          finish reason. The request begins with the first; leaving the loop early cancels it.

        Raises:
          InvalidArgumentError: a bad prompt or parameter, at once.
          NotFiniteError: the model's logits are NaN or infinite, from the iterator.
        """
        tokenized: TokenizedPrompt
        first = prompt[0] if isinstance(prompt, Sequence) and prompt else None
        if inputs.is_conversation(prompt) or inputs.is_conversation(first):
            conversations = inputs.as_conversations(prompt)
            if len(conversations) != 1:
                raise InvalidArgumentError(f"stream takes one conversation, got {len(conversations)}: use chat.")
            tokenized = self._tokenize_chat(conversations[0], 0, True, None, None)
        else:
            prompts = inputs.as_prompts(prompt)
            if len(prompts) != 1:
                raise InvalidArgumentError(f"stream takes one prompt, got {len(prompts)}: use generate for several.")
            tokenized = inputs.tokenize(prompts[0], self._tokenizer, self.model_config.vocab_size, index=0)
        (params,) = inputs.one_each("sampling_params", sampling_params, SamplingParams, SamplingParams(), 1)
        if params.n != 1:
            raise InvalidArgumentError(f"n must be 1 in stream, got {params.n}: use generate for several answers.")
        return self._increments(self._check([tokenized], params, compression_params))

    def _increments(self, requests: Sequence[_Request]) -> Iterator[RequestOutput]:
        """What `stream` returns: a function of its own, for it runs from the first `next` on."""
        (submission,) = self._queue(requests)
        try:
            while not submission.finished:
                self._step([submission])
                if submission.has_news and not submission.finished:
                    yield submission.output(increment=True)
            if submission.error is not None:  # another call's step has met it
                raise submission.error
            yield submission.output(increment=True)
        finally:
            self.engine.cancel(submission)

    def _step(self, submissions: Sequence[Submission]) -> None:
        """A step for these. Errors that are about requests of other calls alone wait for those."""
        try:
            self.engine.step()
        except Exception as error:
            own = next((each.error for each in submissions if each.error is not None), None)
            if own is error or not blamed_requests(error):
                raise
            if own is not None:  # it came with that of others
                raise own from error

    def reset_prefix_cache(self) -> None:
        """Forgets the prefixes that are kept for reuse; their pages are free with the next step."""
        self.engine.reset_prefix_cache()

    def _tokenize_chat(
        self,
        messages: Any,
        index: int,
        add_generation_prompt: bool,
        chat_template: str | None,
        tools: list[dict] | None,
    ) -> TokenizedPrompt:
        text = inputs.render_chat(
            messages,
            self._tokenizer,
            index=index,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            tools=tools,
        )
        vocab_size = self.model_config.vocab_size
        return inputs.tokenize(text, self._tokenizer, vocab_size, index=index, special_tokens=False)

    def _submit(
        self,
        prompts: Sequence[TokenizedPrompt],
        sampling_params: Any,
        compression_params: Any,
    ) -> list[Submission]:
        """Checks every prompt and parameter, then queues them all: after an error none is queued."""
        return self._queue(self._check(prompts, sampling_params, compression_params))

    def _queue(self, requests: Sequence[_Request]) -> list[Submission]:
        """Queues requests that have been checked: all of them, or after an error none."""
        names, num_added = [str(next(self._request_ids)) for _ in requests], self.engine.num_added
        try:
            return [self.engine.add(name, *request) for name, request in zip(names, requests, strict=True)]
        except BaseException:  # nobody would wait for those that were taken
            self.engine.withdraw(names)
            self.engine.num_added = num_added
            raise

    def _check(
        self,
        prompts: Sequence[TokenizedPrompt],
        sampling_params: Any,
        compression_params: Any,
    ) -> list[_Request]:
        """Each prompt with its parameters, all of them checked and their methods enabled."""
        params = inputs.one_each("sampling_params", sampling_params, SamplingParams, SamplingParams(), len(prompts))
        default = self.config.default_compression or CompressionParams()
        compression = inputs.one_each(
            "compression_params", compression_params, CompressionParams, default, len(prompts)
        )
        for i, each in enumerate(params):
            if each.stop_strings and self._tokenizer is None:
                raise InvalidArgumentError(
                    f"sampling_params {i} has stop strings, but there is no tokenizer to see them."
                )
            inputs.check_stop_ids(each, self.model_config.vocab_size, name=f"sampling_params {i}")
        allowed = self.config.methods
        for i, each in enumerate(compression):
            if allowed is not None and each.method not in self._methods:
                raise InvalidArgumentError(
                    f"compression_params {i} asks for method {each.method!r}; this engine was built with "
                    f"methods={', '.join(allowed)}."
                )
        if not {each.method for each in compression} <= self._methods:
            self._check_before_rebuild(prompts, compression)
        self.enable_methods([each.method for each in compression])
        requests = list(zip(prompts, params, compression, strict=True))
        for i, request in enumerate(requests):
            self.engine.check(*request, name=f"prompt {i}")
        self.engine.check_together(compression)
        return requests

    def _check_before_rebuild(self, prompts: Sequence[TokenizedPrompt], params: Sequence[CompressionParams]) -> None:
        """Refuses what no engine of this model serves: to rebuild the cache for it would lose what is in there."""
        for i, (prompt, compression) in enumerate(zip(prompts, params, strict=True)):
            check_length(len(prompt.token_ids), self.engine.scheduler.config.max_model_len, name=f"prompt {i}")
            if compression.evicts:
                compression.rule.check_layers(self.model_config.num_layers)
            if compression.selects:
                Selections(self.model_config, max_slots=1, page_size=1).check(compression)

    def _run(
        self,
        prompts: Sequence[TokenizedPrompt],
        sampling_params: Any,
        compression_params: Any,
        use_tqdm: bool,
        on_output: Callable[[int, RequestOutput], None] | None,
    ) -> list[RequestOutput]:
        if on_output is not None and not callable(on_output):
            raise InvalidArgumentError(f"on_output must be a function of an index and an output, got {on_output!r}.")
        submissions = self._submit(prompts, sampling_params, compression_params)
        active, unfinished, shown, ended = submissions, self.engine.num_unfinished, 0.0, (0, 0)
        index = {each.request_id: i for i, each in enumerate(submissions)}

        ready: deque[Submission] = deque()  # ended, and not handed over yet

        def hand_over(done: Iterable[Submission]) -> None:
            ready.extend(done)
            while ready:
                each = ready.popleft()
                if on_output is not None:
                    on_output(index[each.request_id], each.output())

        bar = tqdm(total=len(submissions), desc="generating", unit="prompt", disable=not use_tqdm)
        try:
            with bar, quiet_collector():
                while active:
                    self._step(active)
                    # A pass over all requests at every step would take as long as the step if there were thousands.
                    before, unfinished, now = unfinished, self.engine.num_unfinished, time.monotonic()
                    if unfinished == before and now - shown < SECONDS_BETWEEN_LOOKS:
                        continue
                    done = [each for each in active if each.finished]
                    ended = _add_tokens(ended, done)
                    bar.update(len(done))
                    active = [each for each in active if not each.finished]
                    hand_over(each for each in done if each.error is None)
                    for each in done:
                        if each.error is not None:  # a step of another call has met it
                            raise each.error
                    if now - shown >= SECONDS_BETWEEN_LOOKS or not active:
                        computed, generated = _add_tokens(ended, active)
                        bar.set_postfix({"cached tokens": computed, "generated": generated}, refresh=False)
                        shown = now
        except BaseException:  # some may have ended in the very step that failed, or not have been handed over yet
            hand_over(each for each in active if each.finished and each.error is None)
            raise
        finally:  # an interrupted call leaves nothing behind in the engine
            for submission in submissions:
                self.engine.cancel(submission)
        return [submission.output() for submission in submissions]


def _add_tokens(so_far: tuple[int, int], submissions: Iterable[Submission]) -> tuple[int, int]:
    """(tokens in the cache, tokens generated): those so far, and those of more submissions."""
    computed, generated = so_far
    for each in submissions:
        computed += sum(answer.request.num_computed for answer in each.answers)
        generated += each.num_generated_tokens
    return computed, generated


def eos_token_ids(model_config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: the checkpoint's, and what only the tokenizer names."""
    ids = (*model_config.eos_token_ids, getattr(tokenizer, "eos_token_id", None))
    return tuple(dict.fromkeys(token for token in ids if token is not None))
