import importlib.util
import sys
from pathlib import Path

import pytest

from fastlora.compose import lorahub

# tiny_models.py
sys.path.append(str(Path(__file__).parent))

_NEEDS = {"test_merge.py": ["peft"], "test_search.py": ["nevergrad"], "test_lorahub.py": ["nevergrad", "transformers"],
          "test_original.py": ["nevergrad", "peft", "transformers"]}  # fmt: skip
collect_ignore = [name for name, needs in _NEEDS.items() if not all(map(importlib.util.find_spec, needs))]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(lorahub, "NEW_TOKENS", 5)
