"""Doors over `pipeline` that are not part of a training run."""
