"""The kernels of these tests are imported by name, as a user's are, here and in the compilers."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
