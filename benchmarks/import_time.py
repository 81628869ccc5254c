"""Print what `import lightning_edge` costs beyond `import lightning`, in seconds of wall time.

    .venv/bin/python benchmarks/import_time.py

Medians over fresh interpreters, the statements taking turns so that a busy machine slows all of them. Exits with
status 1 if the import costs more than 0.2 s.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

ROUNDS = 7
LIMIT_S = 0.2
STATEMENTS = {
    "import lightning_edge": "import lightning_edge",
    "EdgeCompressionCallback": "import lightning_edge; lightning_edge.EdgeCompressionCallback",
    "DeviceEvaluationCallback": "import lightning_edge; lightning_edge.DeviceEvaluationCallback",
}


def seconds(statement: str) -> float:
    """Time ``statement`` in a fresh interpreter that has imported lightning already."""
    code = f"import lightning, time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure every statement and print a table."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(ROUNDS):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    print(f"seconds beyond `import lightning`, median of {ROUNDS} (lowest to highest)")
    for name, values in times.items():
        print(f"{name:26} {median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    if median(times["import lightning_edge"]) > LIMIT_S:
        sys.exit(f"import lightning_edge costs more than {LIMIT_S} s")


if __name__ == "__main__":
    main()
