"""`python -m prism_pipelines.training`, as `accelerate launch` calls it."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
