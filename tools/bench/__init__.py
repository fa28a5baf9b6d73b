"""What the product costs, measured: ratios of steps and kernels taken in one process, never a test."""

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # read by torch when it is imported; else every profile announces itself
