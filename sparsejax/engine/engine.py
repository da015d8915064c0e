"""The serving loop: plan a step, dispatch it, read the step before. The device never waits for the host.

    submission = engine.add("id", prompt, params)
    while engine.has_unfinished:
        engine.step()
    submission.output()

Sampled tokens feed the next step on the device; the host reads them one step late, so a request that ends at a token
has one surplus token in flight, which is discarded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sparsejax.engine.execution.memory import explain_out_of_memory
from sparsejax.engine.execution.runner import Runner
from sparsejax.engine.in_flight import Compressed, InFlight, Results, dispatch
from sparsejax.engine.programs.eviction import EvictReport
from sparsejax.engine.programs.sampling import NOT_FINITE, SampleOutput
from sparsejax.engine.requests.blame import blame, blamed_requests, blaming
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.detokenizer import Detokenizer, decode_function
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.engine.requests.outputs import Logprob, logprobs_of_token
from sparsejax.engine.requests.request import CompressionRecord, Request, derive_seed, expand
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.requests.stopping import check_stop, detokenizer_for
from sparsejax.engine.requests.submission import Answer, Submission
from sparsejax.engine.scheduling.plan import Chunk, Evict, FullRing
from sparsejax.engine.scheduling.prefix_cache import PrefixCacheStats
from sparsejax.engine.scheduling.scheduler import Scheduler
from sparsejax.errors import DuplicateRequestError, NotFiniteError, SchedulingError

PROBE = "\0probe"  # id of a request that is only checked, never added


class Engine:
    """Continuous batching over one runner.

    Args:
      runner: the compiled steps.
      scheduler: decides what each step computes.
      tokenizer: a transformers tokenizer; None: outputs carry no text.
      seed: seeds requests that bring none.
      clock: seconds, monotonic.

    Attributes:
      wait_seconds: what all steps together have spent waiting for the device.
      eviction_seconds: of these, for evictions and compressions behind the model's runs.
      eviction_observer: called with the entries and the report of every call of the evict program, a step late.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        tokenizer: Any = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.clock = clock
        self._tokenizer = tokenizer
        self._seed = seed
        self.num_added = 0  # prompts so far, from which their seeds follow
        self._decode = None if tokenizer is None else decode_function(tokenizer, skip_special_tokens=False)
        self.wait_seconds = 0.0
        self.eviction_seconds = 0.0
        self.eviction_observer: Callable[[Sequence[Evict], EvictReport], None] | None = None
        self._in_flight: InFlight | None = None
        self._answers: dict[str, tuple[Submission, Answer]] = {}  # by request id of each answer, unfinished
        self._submitted: set[str] = set()  # ids of submissions that have such

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self.scheduler.num_unfinished

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do: requests to serve, or results to read."""
        return self.scheduler.has_unfinished or self._in_flight is not None

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        """What prefix caching did and holds; all zero if it is off."""
        return self.scheduler.prefix_cache_stats

    def reset_prefix_cache(self) -> None:
        """Gives up all rows that are kept for reuse; their pages are free with the next step."""
        self.scheduler.reset_prefix_cache()

    def drain(self) -> None:
        """Reads the results of steps that nobody waits for: those that ran on past the last request's end."""
        while self.has_unfinished and not self.scheduler.has_unfinished:
            self.step()

    def close(self) -> None:
        """Gives the device memory of cache and state back; the engine is of no use then, unless it is reopened."""
        self.runner.close()

    def reopen(self) -> None:
        """Begins anew after `close`, with nothing in the cache.

        Raises:
          OutOfMemoryError: the memory is no longer there.
        """
        self.scheduler.restart()
        self.runner.reset()

    def check(
        self,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        compression: CompressionParams | None = None,
        *,
        name: str = "prompt",
    ) -> None:
        """Raises what `add` would raise for this prompt, and changes nothing.

        Args:
          name: what messages call the prompt.

        Raises:
          InvalidArgumentError: the prompt is longer than the engine can ever serve.
        """
        request = Request(PROBE, prompt.token_ids, params, compression or CompressionParams())
        self.runner.check(request.compression)
        self.scheduler.check(request, name=name)

    def check_together(self, several: Iterable[CompressionParams]) -> None:
        """Raises unless requests that ask for these may all be added, as `check` says of each alone.

        Raises:
          InvalidArgumentError: they make more different choices than one engine serves.
        """
        self.runner.check_together(several)

    def add(
        self,
        request_id: str,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        compression: CompressionParams | None = None,
    ) -> Submission:
        """Queues a prompt; its answers grow with every `step`.

        Raises:
          InvalidArgumentError: the id is in use, or the prompt is longer than the engine can ever serve.
        """
        self.runner.check(compression or CompressionParams())
        if request_id in self._submitted:
            raise DuplicateRequestError(f"request_id {request_id!r} is in use by an unfinished request.")
        self.num_added += 1
        requests = expand(
            request_id, prompt.token_ids, params, compression=compression, seed=derive_seed(self._seed, self.num_added)
        )
        for request in requests:
            self.scheduler.check(request)
        answers = [self._answer(request) for request in requests]
        submission = Submission(request_id, prompt, answers, arrival_time=self.clock())
        if params.prompt_logprobs is not None:
            submission.prompt_logprobs = [None]
        try:
            self.runner.take(compression or CompressionParams())
            self._submitted.add(request_id)
            for request, answer in zip(requests, answers, strict=True):
                request.arrival_time = submission.arrival_time
                self._answers[request.request_id] = (submission, answer)
                self.scheduler.add(request)
        except BaseException:  # an interrupt: nobody would wait for what was taken
            self._submitted.discard(request_id)
            for request in requests:
                self._answers.pop(request.request_id, None)
                self.scheduler.cancel(request.request_id)
            raise
        return submission

    def cancel(self, submission: Submission) -> None:
        """Ends the unfinished answers of a submission with reason "abort"; what they have so far stays."""
        try:
            for answer in submission.answers:
                if not answer.request.finished:
                    self._finish(submission, answer, "abort")
        except BaseException as error:
            self._recover(error)
            raise

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Cancels what was added under these ids and has not ended."""
        names = set(request_ids)
        for submission in {id(each): each for each, _ in self._answers.values() if each.request_id in names}.values():
            self.cancel(submission)

    def step(self) -> None:
        """Dispatches the next step and reads the previous one.

        If a step fails or is interrupted, requests that were being computed are kept and replayed by the next call, but
        for those whose own method or text it failed at (`blamed_requests` of the exception): they end with reason
        "abort", and their submission holds the error, so that the others go on.

        Raises:
          OutOfMemoryError: the device has no room for the step.
          SchedulingError: device and scheduler disagree about the cache.
          NotFiniteError: a request has no next token; it is ended.
        """
        try:
            with explain_out_of_memory("running a step"):
                self._step()
        except BaseException as error:
            self._recover(error)
            raise

    def _recover(self, error: BaseException) -> None:
        """Makes whole what a step has left when this was raised, wherever in it that was.

        What the device has done is unknown, and its cache may be gone: it was donated. So all requests are replayed.
        """
        self._in_flight = None
        ends: dict[str, BaseException] = {each.request_id: error for each in blamed_requests(error)}
        answers = list(self._answers.items())
        for request_id, (_, answer) in answers:
            try:
                self._forget_unread(answer)
            except Exception as own:  # its tokens have no text; it cannot go on
                answer.detokenizer = None
                ends.setdefault(request_id, own)
        self.scheduler.restart()
        self.runner.reset()
        for request_id, (submission, answer) in answers:
            if answer.request.finished:
                self._conclude(submission, answer)
            elif request_id in ends:
                submission.error = ends[request_id]
                self._finish(submission, answer, "abort")

    def _step(self) -> None:
        if self.scheduler.must_preempt():
            self._read()  # a victim's replay needs every token it was given
        plan = self.scheduler.schedule()
        flight = dispatch(self.runner, plan)
        self._read()
        self._in_flight = flight

    def _read(self) -> None:
        """Waits for the plan in flight and hands out its tokens."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return
        start = time.perf_counter()
        results = flight.read()
        self.wait_seconds += time.perf_counter() - start
        self.eviction_seconds += results.seconds
        counts: Any = results.measured.usage  # on the host by now
        expected = self.scheduler.settle(flight.balance, counts)
        free = jax.tree.map(int, results.measured.free_entries)
        if not results.ok or free != expected:
            raise SchedulingError(
                f"the device has {free} free table entries where the scheduler counted {expected}"
                f"{'' if results.ok else ', and something did not fit'}. The cache is emptied. Please report this."
            )
        for each in results.compressed:
            self._take_compression(each)
        self._take_stored(results)
        for entries, report in results.evictions:
            self._take_eviction(entries, report)
            if self.eviction_observer is not None:
                self.eviction_observer(entries, report)
        for step in results.steps:
            if step.output.prompt is not None:
                self._take_prompt_logprobs(step.chunks, step.output.prompt)
            for lane, request in step.sampling:
                self._take_token(request, lane, step.output.sample)

    def _take_compression(self, compressed: Compressed) -> None:
        request = compressed.entry.request
        answer = self._answer_of(request)
        record = CompressionRecord() if answer is None else answer.compression
        record.count += 1
        record.seconds += compressed.seconds
        pages = self.runner.eviction_shapes.layout.pages_per_entry
        record.pages_before, record.pages_after = pages * compressed.entries_before, pages * compressed.entries_after
        record.bytes_before = self._bytes_of(compressed.entries_before)
        record.bytes_after = self._bytes_of(compressed.entries_after)
        record.kept_tokens = compressed.kept
        assert request.footprint is not None, "only requests that evict are compressed"
        if compressed.entry.text_length == request.footprint.schedule.context:
            # Also if it has ended: others take over its context, as it is now.
            self.scheduler.describe(request, dataclasses.replace(record))
        if answer is not None:
            answer.kv_bytes = max(answer.kv_bytes, record.bytes_before)

    def _take_eviction(self, entries: Sequence[Evict], report: EvictReport) -> None:
        """Keeps how many tokens per-step evictions left."""
        for lane in np.flatnonzero(report.active < report.active_before):  # none of the lanes that pad the call
            answer = self._answer_of(entries[int(lane)].request)
            if answer is not None:
                answer.compression.kept_tokens = np.array(report.live[:, lane])  # a copy: see `InFlight.read`

    def _take_stored(self, results: Results) -> None:
        """Counts what chunks and full rings have compressed, of requests that are stored compressed."""
        limits = self.scheduler.config.store
        if limits is None:
            return
        chunks = [
            chunk
            for step in results.steps
            for chunk in step.chunks
            if chunk.request.compression.compresses and limits.compresses(chunk.start, chunk.count)
        ]
        for each in (*chunks, *results.rings):
            answer = self._answer_of(each.request)
            if answer is None:
                continue
            answer.compression.count += 1
            if isinstance(each, FullRing):  # a chunk is compressed within the model's run
                answer.compression.seconds += results.seconds / len(results.rings)

    def _answer_of(self, request: Request) -> Answer | None:
        """None if it has ended; results come a step late, when another request may have its id."""
        found = self._answers.get(request.request_id)
        return found[1] if found is not None and found[1].request is request else None

    def _bytes_of(self, entries: Any) -> int:
        """Device memory of table entries, as the layout of the cache counts them; 0 of none."""
        return self.runner.layout.bytes_of(entries) if entries else 0

    def _take_token(self, request: Request, lane: int, sample: SampleOutput) -> None:
        token = int(sample.token[lane])
        if token == NOT_FINITE and not request.finished:
            self._refuse(request)
        if not request.record(token):
            return
        submission, answer = self._answers[request.request_id]
        if submission.first_token_time is None:
            submission.first_token_time = self.clock()
        try:
            if answer.logprobs is not None:
                entry = self._logprobs(sample, lane, request.params.logprobs or 0)
                answer.logprobs.append(entry)
                answer.cumulative_logprob += entry[token].logprob
            eos = self.runner.eos_token_ids
            stop = check_stop(request, token, eos_token_ids=eos, detokenizer=answer.detokenizer)
            if stop is not None:
                self._finish(submission, answer, stop.finish_reason, stop.stop_reason)
        except Exception as error:  # the tokenizer's, or its method's
            blame(error, [request])
            raise
        answer.num_read = len(request.output_token_ids)

    def _forget_unread(self, answer: Answer) -> None:
        """Undoes what has been taken of a token whose taking was interrupted. A replay draws it again.

        Else it would count as one that does not end the answer.
        """
        request, detokenizer = answer.request, answer.detokenizer
        if request.finished or len(request.output_token_ids) == answer.num_read:
            return
        del request.output_token_ids[answer.num_read :]
        if answer.logprobs is not None:
            del answer.logprobs[answer.num_read :]
            entries = zip(answer.logprobs, request.output_token_ids, strict=True)
            answer.cumulative_logprob = sum(entry[token].logprob for entry, token in entries)
        if detokenizer is not None:
            answer.detokenizer = self._detokenizer(request)
            answer.detokenizer.replay(request.output_token_ids, like=detokenizer)

    def _refuse(self, request: Request) -> None:
        """Says that a request has no next token."""
        error = NotFiniteError.after(f"request {request.request_id!r}", len(request.output_token_ids))
        blame(error, [request])
        raise error

    def _take_prompt_logprobs(self, chunks: Sequence[Chunk], prompt: SampleOutput) -> None:
        lane = 0
        for chunk in chunks:
            request = chunk.request
            submission = self._answers[request.request_id][0] if self._answer_of(request) is not None else None
            wanted = request.params.prompt_logprobs
            for position in range(chunk.start + 1, chunk.start + chunk.count + 1):
                # Position by position in order; a replay, or another answer to the same prompt, adds nothing.
                known = None if submission is None else submission.prompt_logprobs
                if known is not None and len(known) == position < len(request.prompt_token_ids):
                    with blaming([request]):
                        known.append(self._logprobs(prompt, lane, wanted or 0))
                lane += 1

    def _logprobs(self, sample: SampleOutput, lane: int, count: int) -> dict[int, Logprob]:
        assert sample.logprob is not None
        assert sample.rank is not None
        assert sample.top_ids is not None
        assert sample.top_logprobs is not None
        decode = self._decode
        return logprobs_of_token(
            int(sample.token[lane]),
            float(sample.logprob[lane]),
            int(sample.rank[lane]),
            sample.top_ids[lane].tolist(),
            sample.top_logprobs[lane].tolist(),
            count,
            None if decode is None else lambda token: decode([token]),
        )

    def _answer(self, request: Request) -> Answer:
        detokenizer = None if self._tokenizer is None else self._detokenizer(request)
        return Answer(request, detokenizer, logprobs=None if request.params.logprobs is None else [])

    def _detokenizer(self, request: Request) -> Detokenizer:
        decode = decode_function(self._tokenizer, skip_special_tokens=request.params.skip_special_tokens)
        return detokenizer_for(request, decode)

    def _finish(
        self, submission: Submission, answer: Answer, reason: str, stop_reason: int | str | None = None
    ) -> None:
        request = answer.request
        held = [self.scheduler.held_entries(request)]
        if request.num_preemptions and not request.compression.evicts:
            # While it waits to be replayed it holds nothing, but it did hold its whole replay. What a request held that
            # evicts was measured at each compression.
            held.append(self.scheduler.replayed_entries(request))
        answer.kv_bytes = max(answer.kv_bytes, *map(self._bytes_of, held))
        answer.read_tokens = self.runner.read_tokens(request)
        self.scheduler.finish(request, reason, stop_reason)
        self._conclude(submission, answer)

    def _conclude(self, submission: Submission, answer: Answer) -> None:
        """What is left to do for an answer whose request has ended."""
        if submission.finished:
            submission.finished_time = self.clock()
            self._submitted.discard(submission.request_id)
        self._answers.pop(answer.request.request_id, None)
        if answer.detokenizer is not None:
            with contextlib.suppress(Exception):  # who asks for its text will be told
                answer.detokenizer.finish()
