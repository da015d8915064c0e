"""Many questions over one long context, which is computed and compressed once.

The first request computes the context and compresses it before it sees its question. A copy of the compressed cache
stays, so that every later request with the same context and the same parameters takes it over and computes its own
question only. The method must not need the question to choose: this is for query-agnostic ones, such as keydiff,
compactor or kvzip.

    python examples/many_questions.py --method keydiff --keep-fraction 0.4
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from sparsejax import LLM, CompressionParams, SamplingParams, SparsejaxError
from sparsejax.evaluation.tasks import Deck, compose, needles


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or id (default: the embedded tiny model)")
    parser.add_argument("--method", default="keydiff", help="query-agnostic method (default: %(default)s)")
    parser.add_argument("--keep-fraction", type=float, default=0.4, help="of the context (default: %(default)s)")
    parser.add_argument("--length", type=int, default=900, help="words of the context (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the context (default: %(default)s)")
    parser.add_argument(
        "--max-model-len", type=int, default=1024, help="tokens of a prompt and its answer (default: %(default)s)"
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=512, help="most prompt tokens in one step (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.questions < 1:
        parser.error(f"--questions must be at least 1, got {args.questions}")

    rng = random.Random(args.seed)
    material = needles(Deck(rng), keys=args.questions)  # "The secret word of otter is topaz."
    context = compose(rng, material.threads, args.length)
    llm = LLM(
        args.model,
        methods=("full", args.method),
        max_num_seqs=2,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    tokenizer = llm.get_tokenizer()

    def encode(question: str) -> list[int]:
        messages = [{"role": "user", "content": f"{context}\n{question}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)

    prompts = [encode(question.text) for question in material.questions]
    # What two prompts share is the context: the tokens up to the first that differs.
    pairs = zip(prompts[0], encode("?"), strict=False)
    context_tokens = next(place for place, (ours, theirs) in enumerate(pairs) if ours != theirs)
    compression = CompressionParams(
        method=args.method, keep_fraction=args.keep_fraction, context_tokens=context_tokens, compress_once=True
    )
    print(f"{context_tokens} tokens of context, {args.keep_fraction:.0%} kept by {args.method}")
    print(f"{'computed':>8} {'cached':>7} {'KiB held':>9} {'ms':>7}  question, answer")

    params = SamplingParams(temperature=0.0, max_tokens=8)
    right, compressions = 0, []
    for question, prompt in zip(material.questions, prompts, strict=True):
        began = time.perf_counter()
        (output,) = llm.generate(prompt, params, compression, use_tqdm=False)
        seconds = time.perf_counter() - began
        answer, metrics = output.outputs[0].text.strip(), output.metrics
        right += answer == question.answer
        if metrics.num_compressions:
            compressions.append(metrics)
        print(
            f"{len(prompt) - metrics.num_cached_tokens:>8} {metrics.num_cached_tokens:>7} "
            f"{metrics.kv_bytes / 1024:>9.0f} {1e3 * seconds:>7.0f}  {question.text} {answer} "
            f"({'right' if answer == question.answer else 'wrong: ' + question.answer})"
        )
    before, after = (
        sum(getattr(each, f"kv_bytes_{when}_compression") for each in compressions) for when in ("before", "after")
    )
    print(
        f"{right} of {len(prompts)} right; contexts compressed: {len(compressions)}, "
        f"from {before / 1024:.0f} to {after / 1024:.0f} KiB in all"
    )


if __name__ == "__main__":
    try:
        main()
    except (SparsejaxError, OSError) as error:
        sys.exit(f"many_questions: {error}")
