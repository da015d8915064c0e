"""A radix tree over blocks of tokens: finds the texts that begin as a given text does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

Owner = TypeVar("Owner")


class _Node(Generic[Owner]):
    """A run of whole blocks (`tokens`) behind the parent's. `owners`: those whose whole blocks end here."""

    __slots__ = ("children", "owners", "parent", "tokens")

    def __init__(self, tokens: Sequence[int], parent: _Node[Owner] | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[tuple[int, ...], _Node[Owner]] = {}
        self.owners: dict[Owner, None] = {}


class PrefixTree(Generic[Owner]):
    """Texts by owner. Nodes split at block boundaries only, so there are at most two nodes per owner.

    Args:
      block: tokens of a block. Texts that share less are not found.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self._root: _Node[Owner] = _Node((), None)
        self._nodes: dict[Owner, _Node[Owner]] = {}
        self._texts: dict[Owner, Sequence[int]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, owner: Owner) -> bool:
        return owner in self._texts

    def text(self, owner: Owner) -> Sequence[int]:
        """The whole text of an owner, its partial last block included."""
        return self._texts[owner]

    def insert(self, owner: Owner, text: Sequence[int]) -> None:
        """Enters a text. An owner has at most one, and does not change it."""
        assert owner not in self._texts
        whole = len(text) // self.block * self.block
        node, depth = self._root, 0
        while depth < whole:
            first = tuple(text[depth : depth + self.block])
            child = node.children.get(first)
            if child is None:
                child = _Node(text[depth:whole], node)
                node.children[first] = child
            shared = self._shared_blocks(child.tokens, text, depth, whole)
            if shared < len(child.tokens):
                child = self._split(child, shared)
            node, depth = child, depth + shared
        node.owners[owner] = None
        self._nodes[owner] = node
        self._texts[owner] = text

    def remove(self, owner: Owner) -> None:
        """Takes an owner and its text out."""
        node = self._nodes.pop(owner)
        del self._texts[owner]
        del node.owners[owner]
        if node.parent is not None and not node.owners and not node.children:
            parent = node.parent
            del parent.children[self._key(node)]
            node = parent
        self._merge_with_only_child(node)

    def sharing(self, text: Sequence[int]) -> Iterator[tuple[int, list[tuple[Owner, int]]]]:
        """Owners whose texts share at least a block with `text`, those that share most blocks first.

        Yields:
          (depth, [(owner, tokens shared), ...]) in groups: each shares at least `depth` tokens, a multiple of the
          block, and fewer than depth + block, unless its own text or `text` is shared whole.
        """
        path: list[tuple[int, _Node[Owner]]] = []  # tokens shared on the way into the node, deepest last
        node, depth, whole = self._root, 0, len(text) // self.block * self.block
        while depth < whole:
            child = node.children.get(tuple(text[depth : depth + self.block]))
            if child is None:
                break
            shared = self._shared_blocks(child.tokens, text, depth, whole)
            depth += shared
            path.append((depth, child))
            if shared < len(child.tokens):
                break
            node = child
        below: _Node[Owner] | None = None
        for depth, node in reversed(path):
            tail = text[depth : depth + self.block]
            yield depth, [(owner, self._shared(owner, tail, depth)) for owner in self._owners(node, without=below)]
            below = node

    def _shared(self, owner: Owner, tail: Sequence[int], depth: int) -> int:
        """Tokens that an owner's text shares with one that is equal up to `depth` and then goes on as `tail`."""
        for own, token in zip(self._texts[owner][depth : depth + self.block], tail, strict=False):
            if own != token:
                break
            depth += 1
        return depth

    def _owners(self, node: _Node[Owner], *, without: _Node[Owner] | None) -> Iterator[Owner]:
        """All owners at and below a node, except below `without`."""
        yield from node.owners
        stack = [child for child in node.children.values() if child is not without]
        while stack:
            node = stack.pop()
            yield from node.owners
            stack += node.children.values()

    def _shared_blocks(self, edge: Sequence[int], text: Sequence[int], start: int, stop: int) -> int:
        """Tokens of the whole blocks with which both `edge` and `text[start:stop]` begin."""
        size = min(len(edge), stop - start)
        if edge[:size] == text[start : start + size]:
            return size
        at = 0
        while edge[at : at + self.block] == text[start + at : start + at + self.block]:
            at += self.block
        return at

    def _key(self, node: _Node[Owner]) -> tuple[int, ...]:
        return tuple(node.tokens[: self.block])

    def _split(self, node: _Node[Owner], at: int) -> _Node[Owner]:
        """Cuts a node's run in two; returns the new upper one."""
        assert node.parent is not None
        upper: _Node[Owner] = _Node(node.tokens[:at], node.parent)
        node.parent.children[self._key(node)] = upper
        node.tokens, node.parent = node.tokens[at:], upper
        upper.children[self._key(node)] = node
        return upper

    def _merge_with_only_child(self, node: _Node[Owner]) -> None:
        """Joins a node that nobody ends at with its child, if it has one only."""
        if node.parent is None or node.owners or len(node.children) != 1:
            return
        (child,) = node.children.values()
        node.parent.children[self._key(node)] = child
        child.tokens, child.parent = [*node.tokens, *child.tokens], node.parent
