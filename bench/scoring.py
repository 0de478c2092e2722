"""What scoring costs beside the model itself: `python bench/scoring.py`; see `bench.scorer`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This file's folder, which Python puts first, would hide the package `pipeline`.
    sys.path[0] = str(Path(__file__).parents[1])
    from bench.scorer import main

    main()
