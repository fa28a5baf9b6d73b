"""Offline evaluation: answers, verdicts, scores with intervals, and cross-entropies. Never imports deepspeed."""
