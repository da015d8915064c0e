"""The radix tree against a dictionary of texts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.engine.scheduling.prefix_tree import PrefixTree

TEXTS = st.lists(st.integers(0, 1), max_size=14)  # two tokens: prefixes are shared all the time


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def nodes(tree: PrefixTree) -> list:
    stack, found = [tree._root], []
    while stack:
        found.append(stack.pop())
        stack += found[-1].children.values()
    return found[1:]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([1, 2, 4]), st.lists(st.tuples(st.integers(0, 5), TEXTS), max_size=25), st.lists(TEXTS, max_size=6)
)
def test_finds_what_a_scan_over_all_texts_finds(block, steps, queries):
    tree, texts = PrefixTree(block), {}
    for owner, text in steps:
        if owner in texts:
            tree.remove(owner)
            del texts[owner]
        else:
            tree.insert(owner, text)
            texts[owner] = text
        for query in [*queries, text, [*text, 0], text[:-1]]:
            groups = list(tree.sharing(query))
            found = {owner: shared for _, owners in groups for owner, shared in owners}
            assert found == {each: n for each in texts if (n := common(texts[each], query)) >= block}
            assert sum(len(owners) for _, owners in groups) == len(found), "each once"
            depths = [depth for depth, _ in groups]
            assert depths == sorted(set(depths), reverse=True)
            assert all(depth % block == 0 for depth in depths)
            assert all(depth <= shared < depth + block for depth, owners in groups for _, shared in owners)
        assert len(tree) == len(texts)
        assert len(nodes(tree)) <= 2 * len(texts)
        for node in nodes(tree):
            assert node.tokens, "every node is a run of blocks"
            assert len(node.tokens) % block == 0
            assert node.owners or len(node.children) > 1, "no node without a reason"
    for owner in texts:
        tree.remove(owner)
    assert not nodes(tree)
