"""Which architectures are learned: a tiny model of each, walked, written and run."""

import sys
from pathlib import Path

# what tests make models of and compare logits with
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))
