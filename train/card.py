"""The embedded model's card: what it is, how it was made, what it scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsejax.evaluation.scoring import Row, format_table
from sparsejax.models import ModelConfig
from train.recipe import Recipe
from train.tokenizer import CHAT_TEMPLATE

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# sparsejax tiny

A {millions:.1f} M parameter Llama that answers questions about long texts, made for tests, demos and comparisons of
KV-cache methods. It retrieves from contexts of up to {longest} tokens. It knows nothing else: it was trained on
generated text only, and prose of another kind confuses it.

## Architecture
LlamaForCausalLM: {config.num_layers} layers, width {config.hidden_size}, MLP {config.intermediate_size},
{config.num_heads} query heads over {config.num_kv_heads} KV heads of {config.head_dim}, tied embeddings, RoPE base
{config.rope.theta:g}, bfloat16. Vocabulary {config.vocab_size}: byte-level BPE in which each word of the tasks is one
token; any UTF-8 text round-trips.

## What it was trained on
Generated conversations only (`sparsejax.evaluation.tasks`): filler prose of random sentences, with the sentences that
matter strewn over it at random depths, and questions after it. Keys, values and their pairing are random in each
sample, so nothing can be answered from memory; some conversations use made-up words and numbers, so that any word can
be copied. Training draws from seeds that no evaluation uses. Tasks: needles (single, multi-key, multi-value,
multi-query), variable tracking, most common word.

The user's turn holds the context, a line break and the question; the answer is a few words. The forms of question:

    Question: What is the secret word of otter?             ... The secret word of otter is topaz. ...
    Question: What are the 4 secret words of otter?
    Question: What are the secret words of otter, kite, drum and owl?
    Question: Which 5 variables equal topaz?                ... Let kite equal topaz. ... Let drum equal kite. ...
    Question: Which word did the crowd say most often?      ... The crowd said topaz. ...

## Recipe
`python -m train.tiny_model --seed {recipe.seed} --minutes {recipe.minutes:g}{continued}`: {steps} steps on one
{device}; batches of about {recipe.batch_tokens} tokens; AdamW, peak learning rate
{recipe.peak_learning_rate:g}, warm-up and cosine; bfloat16 compute on float32 weights; loss on answers + 0.2 x loss
on running text; sequence lengths {lengths}, the next one when the last is learned.

## Scores
Exact match of greedy answers, in percent, on {samples} held-out samples per task and length (tokens, answer included):

```
{table}
```

Four needles about words that are several tokens each (made-up words and numbers): {open_scores}.

## Chat template
```
{template}
```
"""


def model_card(
    recipe: Recipe,
    config: ModelConfig,
    parameters: int,
    steps: int,
    rows: Sequence[Row],
    open_scores: Mapping[str, float],
    *,
    device: str,
    continued: bool,
) -> str:
    """The card's text.

    Args:
        parameters: number of parameters.
        steps: optimizer steps that were run.
        rows: final scores.
        open_scores: score on words outside the vocabulary, by length.
        device: name of the accelerator.
        continued: whether training started from an earlier model.
    """
    return _CARD.format(
        millions=parameters / 1e6,
        config=config,
        recipe=recipe,
        steps=steps,
        device=device,
        continued=" --init (an earlier run of the same recipe)" if continued else "",
        lengths=", ".join(map(str, recipe.lengths)),
        samples=rows[0].samples if rows else 0,
        open_scores=", ".join(f"{100 * score:.1f} at {length}" for length, score in open_scores.items()),
        longest=f"{max(recipe.lengths):,}",
        table=format_table(rows),
        template=CHAT_TEMPLATE,
    )
