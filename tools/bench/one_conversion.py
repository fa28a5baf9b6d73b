"""One conversion in a process of its own: `python tools/bench/one_conversion.py WAY CHECKPOINT OUT DTYPE`.

WAY is `ours` or `zero_to_fp32`. The last line of output is JSON: seconds from the call until the files are on the disk
(imports are not counted), and the peak resident set in bytes, mapped file pages included.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402


def ours(checkpoint: str, out: str, dtype: str) -> Callable[[], object]:
    """What `python tools/zero_to_hf.py CHECKPOINT OUT` does."""
    from pipeline.checkpoints.convert import DTYPES, convert

    return lambda: convert(Path(checkpoint), Path(out), dtype=DTYPES[dtype], allow_attacked=False)


def zero_to_fp32(checkpoint: str, out: str, dtype: str) -> Callable[[], object]:
    """DeepSpeed's converter, writing safetensors."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    return lambda: convert_zero_checkpoint_to_state_dict(checkpoint, out, dtype=dtype, safe_serialization=True)


def main() -> None:
    """Import, convert, wait for the disk, report."""
    way, *arguments = sys.argv[1:]
    call = {"ours": ours, "zero_to_fp32": zero_to_fp32}[way](*arguments)
    os.sync()  # what others wrote before
    start = time.perf_counter()
    call()
    os.sync()
    seconds = time.perf_counter() - start
    # Not ru_maxrss: that begins with the memory of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert peak is not None
    print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * int(peak[1])}))


if __name__ == "__main__":
    main()
