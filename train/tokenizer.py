"""The embedded model's tokenizer: byte-level BPE in which every word of the evaluation tasks is a single token.

Byte-level means that any UTF-8 text encodes and decodes back unchanged; words outside the tasks just take more tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsejax.evaluation.tasks import TASKS, make_sample
from sparsejax.evaluation.words import POOLS

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)
"""The special tokens; a token's id is its place here."""

PAD_ID, BEGIN_ID, END_ID = 0, 1, 2

SYSTEM_PROMPT = "Answer the question about the text."
"""The one system prompt that occurs in training; the model works with and without it."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_ROUND_TO = 64  # the vocabulary is filled up with reserved tokens, so that matrix products stay aligned


def _corpus() -> Iterable[str]:
    """Every word as it stands inside a text (after a space), and samples of each task for its other words."""
    for _ in range(2):  # a merge must be seen twice
        yield from (f" {word}" for pool in POOLS.values() for word in pool)
        yield from (f" {digit}" for digit in range(10))
        yield f" {SYSTEM_PROMPT}"
        yield from (f" {make_sample(task, 256, seed=0, index=index).prompt}" for task in TASKS for index in range(2))


def train_tokenizer() -> Tokenizer:
    """Trains the tokenizer; deterministic.

    Raises:
        RuntimeError: a word of the tasks did not become one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=16384,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    missing = -tokenizer.get_vocab_size() % _ROUND_TO
    tokenizer.add_special_tokens(
        [AddedToken(f"<|reserved_{i}|>", special=True, normalized=False) for i in range(missing)]
    )
    split = [word for pool in POOLS.values() for word in pool if len(tokenizer.encode(f" {word}").ids) != 1]
    if split:
        raise RuntimeError(f"words that are not a single token: {', '.join(split)}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path, *, max_length: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` as transformers reads them."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
