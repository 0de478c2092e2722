"""What everything around the model costs: `python bench/pipeline.py`; see `bench.whole_job`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This file's folder, which Python puts first, would hide the package of the same name.
    sys.path[0] = str(Path(__file__).parents[1])
    from bench.whole_job import main

    main()
