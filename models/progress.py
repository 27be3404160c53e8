"""Progress bars."""

import sys
from typing import Any


def progress_bar(*batches: Any, **options: Any) -> Any:
    """`tqdm` of these arguments, which writes a line every 30 seconds where it goes to a file."""
    from tqdm import tqdm

    return tqdm(*batches, mininterval=0.1 if sys.stderr.isatty() else 30.0, **options)
