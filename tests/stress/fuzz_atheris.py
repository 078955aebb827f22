"""Fuzz one reader with Atheris, which searches for inputs that reach new code.

`python -m tests.stress.fuzz_atheris READER OUT [--examples N] [--seed N]`. `fuzz --engine atheris`
runs it for each reader in a separate process, because Atheris ends its process. The same strategies
make the inputs, and the file OUT holds their outcomes. Install Atheris by hand:
`pip install atheris`.
"""

import argparse
import json
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

_WRITE_EVERY = 50


def main() -> None:
    """Fuzz until all inputs are done or one shows a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("reader")
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    given_ = parser.parse_args()
    try:
        atheris: Any = import_module("atheris")
    except ImportError:
        sys.exit("Atheris is not installed: pip install atheris")
    # Only the product is instrumented: anything else only costs time.
    with atheris.instrument_imports(include=["restitch"]):
        from tests.stress.fuzz import HANG, READERS

    from hypothesis import HealthCheck, given, settings

    reader = next(one for one in READERS if one.name == given_.reader)
    outcomes: Counter[str] = Counter()
    slowest, calls = 0.0, 0

    def write(found: str | None) -> None:
        result = {"outcomes": outcomes, "slowest": round(slowest, 3), "found": found}
        given_.out.write_text(json.dumps(result))

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(reader.inputs)
    def every(value: Any) -> None:
        nonlocal slowest
        started = time.perf_counter()
        try:
            outcomes[reader.check(value)] += 1
        except Exception as error:
            write(f"{type(error).__name__}: {error}\n{value!r}"[:5000])
            raise
        slowest = max(slowest, time.perf_counter() - started)

    tries: Any = every

    def one(data: bytes) -> None:
        nonlocal calls
        calls += 1
        tries.hypothesis.fuzz_one_input(data)
        if calls % _WRITE_EVERY == 0 or calls >= given_.examples:
            write(None)

    limits = (f"-runs={given_.examples}", f"-seed={given_.seed}", f"-timeout={HANG}")
    # Large enough for the strategies.
    atheris.Setup([sys.argv[0], *limits, "-max_len=65536", "-len_control=0"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
