"""Offline evaluation: answers, verdicts, scores with intervals, cross-entropies and sink statistics. Reaches deepspeed
through training/ alone."""
