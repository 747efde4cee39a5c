"""The tests of this folder share harness.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
