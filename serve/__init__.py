"""Serving: the jitted generate loop (`serve.generate`), usable without the engine."""
