"""Scheduling, on the host: who computes what in the next step, over exact counts of what the device holds."""
