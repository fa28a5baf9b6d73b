"""Prepare a data set before training: `python pipeline/curate.py --method dgr --help` shows a method's flags.

The method dgr rewrites a safety reasoning set in the target model's own words; pharmacist chooses the rows of an
alignment set that keep a model safe.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipeline/, whose files would shadow installed modules

from pipeline.config import parse, peek  # noqa: E402
from pipeline.curation import flags_of_others, load_module  # noqa: E402
from pipeline.door import run_door  # noqa: E402


def main() -> None:
    """Parse, hand over to the method."""
    words = sys.argv[1:]
    name = peek("method", words)
    if name is None and {"-h", "--help"} & set(words):
        parse([], words, description=__doc__ or "")
    module = load_module(name)
    module.run(parse(module.CONFIGS, words, description=__doc__ or "", elsewhere=flags_of_others(name)))


if __name__ == "__main__":
    run_door(main)
