"""Seeds are a function of their parts alone, and differ where a part does."""

import subprocess
import sys
from pathlib import Path

from safer_fast.seeds import mix


def test_seeds_are_63_bit_and_distinct():
    parts = [(seed, word, n) for seed in range(5) for word in ("order", "augment") for n in range(50)]
    seeds = {mix(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**61
    assert mix(1, "a") != mix("a", 1)
    assert mix(11, 1) != mix(1, 11)
    assert mix(1, 23) != mix(12, 3)


def test_seeds_are_the_same_in_every_process():
    """No hash randomisation: runs are resumed in another process."""
    code = "from safer_fast.seeds import mix; print(mix(3, 'order', 7))"
    found = {
        subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, text=True)
        for _ in range(2)
    }
    assert found == {f"{mix(3, 'order', 7)}\n"}
