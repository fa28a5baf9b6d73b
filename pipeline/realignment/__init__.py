"""Realignment of a finished model by a safety vector: LSSF (arXiv 2602.00038), and RESTA as its baseline."""
