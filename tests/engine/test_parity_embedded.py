"""The embedded model answers its tasks in bfloat16 with the tokens of transformers' PyTorch generate."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sparsejax import LLM, SamplingParams
from sparsejax.assets import tiny_model_path
from sparsejax.evaluation import ANSWER_TOKENS, build_samples, encode_sample

TASKS = ("single", "multi_value", "variable_tracking")
LENGTHS = (320, 576)  # several chunks of a prefill step each


def test_bfloat16_greedy_tokens_are_those_of_transformers():
    llm = LLM(dtype="bfloat16", max_num_seqs=4, max_num_batched_tokens=256, max_model_len=1024, warmup=False)
    samples = build_samples(llm.get_tokenizer(), tasks=TASKS, lengths=LENGTHS, samples=1, seed=21)
    prompts = [encode_sample(llm.get_tokenizer(), sample).tokens for sample in samples]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS), use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.bfloat16).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=ANSWER_TOKENS)
        np.testing.assert_array_equal(output.outputs[0].token_ids, expected[0, len(prompt) :])
