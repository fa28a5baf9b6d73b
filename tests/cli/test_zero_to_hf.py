"""`python tools/zero_to_hf.py` as a user types it, on checkpoints that train.py wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.checkpoints.markers import MARKER
