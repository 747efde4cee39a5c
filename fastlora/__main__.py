"""`python -m fastlora`: see fastlora.cli."""

import sys

from fastlora.cli import main

sys.exit(main())
