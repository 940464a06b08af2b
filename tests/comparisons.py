"""What it means that two trees are the same."""

from typing import Any

import chex


def assert_same(a: Any, b: Any) -> None:
    """Both trees have one structure, and their arrays the same shapes, dtypes and numbers."""
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(a, b)
