"""Benchmarks: the card's ceilings, and what the engine reaches of them on models of production shape."""
