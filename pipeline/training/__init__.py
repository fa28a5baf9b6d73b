"""The training loop on the DeepSpeed engine, and everything a method may ask of it."""
