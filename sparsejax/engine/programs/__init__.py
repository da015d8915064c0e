"""Programs, on the device: the model's steps, and those that compress, evict and record, as pure functions."""
