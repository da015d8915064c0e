"""Execution: turns plans into calls of compiled programs, and compiles them before the first request."""
