"""Real images, a baseline and the figures: `python -m bench.demo` and `python -m bench.run`, from the repository."""

from __future__ import annotations

import os
import sys

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.path.join(REPOSITORY, ".cache")
"""Where what takes long to make is kept between runs; may be removed at any time."""

# The registry, the eStargz converter and the oracle are the tests' own.
sys.path.append(os.path.join(REPOSITORY, "tests"))
