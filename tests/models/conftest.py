"""Tiny models for these tests."""

from asked_models import make_asked  # noqa: F401  (a fixture)
from tiny_models import make_model  # noqa: F401  (a fixture)
from tiny_vision import make_vision_model  # noqa: F401  (a fixture)
