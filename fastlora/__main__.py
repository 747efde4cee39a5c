"""`python -m fastlora`: see fastlora.cli."""

from fastlora.cli import main

raise SystemExit(main())
