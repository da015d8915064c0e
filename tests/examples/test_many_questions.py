"""The example of many questions over one compressed context does what it says."""

import importlib.util
import re
from pathlib import Path

from embedded import ENGINE

EXAMPLE = Path(__file__).parents[2] / "examples" / "many_questions.py"


def test_a_context_is_computed_and_compressed_once(capsys):
    spec = importlib.util.spec_from_file_location("many_questions", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sizes = [f"--{name.replace('_', '-')}={ENGINE[name]}" for name in ("max_model_len", "max_num_batched_tokens")]
    example.main(["--length", "240", "--questions", "3", *sizes])
    head, _, *lines, summary = capsys.readouterr().out.splitlines()
    context = int(head.split()[0])
    assert 200 < context < 256
    computed, cached, held = zip(*[map(int, line.split()[:3]) for line in lines], strict=True)
    # The first request pays for the context, the others take over all of it.
    assert cached == (0, context, context)
    assert computed[0] > context > 8 * max(computed[1:])
    assert max(held[1:]) < held[0]
    match = re.fullmatch(r"3 of 3 right; contexts compressed: 1, from (\d+) to (\d+) KiB in all", summary)
    assert match, summary
    before, after = map(int, match.groups())
    # Two fifths are kept, and a part of a page in each head.
    assert after < 0.6 * before
