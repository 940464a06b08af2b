"""What is in a compiled program."""

import re
from collections import Counter


def collectives(text):
    """How many there are of each kind, in the text of a program."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))
