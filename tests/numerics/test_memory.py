"""Peak memory of a solve: at most `basis` + 3 vectors and the returned ones, restarts included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="peak resident memory is read from Linux's /proc")

# Run in a process of its own, since peak memory never falls again; getrusage would start from the parent's peak. The
# small solve pays for lazy imports and for the buffers of the linear algebra; the second differs by its dimension only.
SCRIPT = """
import sys, torch
from pathlib import Path
from dyntune import eigenvalues
from dyntune.numerics.operator import LinearOperator
from dyntune.numerics.vectors import VectorSpace
from contextlib import contextmanager

torch.set_num_threads(1)

class Split(LinearOperator):
    "linspace(0, 1, n) on a list of four tensors"
    def __init__(self, n):
        sizes = [n // 8, n // 8, n // 4, n // 2]
        parts = torch.linspace(0, 1, n).split(sizes)
        super().__init__(VectorSpace.of(parts))
        self.parts = parts
    @contextmanager
    def session(self):
        yield lambda v: torch._foreach_mul(self.parts, list(v))

def operator(n):
    if sys.argv[1] == "split":
        return Split(n)
    entries = torch.linspace(0, 1, n)
    return (lambda v: entries * v), n

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

eigenvalues(operator(100_000), basis=6, max_products=40)
N, K = int(sys.argv[2]), int(sys.argv[3])
problem = operator(N)
before = peak()
result = eigenvalues(problem, K, basis=2 * K + 4, max_products=40 * K)
assert result.num_products == 40 * K  # ten restarts or so: half of the rows are kept each time
print((peak() - before) / (4 * N))
"""


@pytest.mark.parametrize(
    ("kind", "n", "k"),
    [
        ("flat", 2_000_000, 1),
        ("split", 2_000_000, 1),
        pytest.param("flat", 10_000_000, 1, marks=pytest.mark.slow),
        pytest.param("split", 10_000_000, 1, marks=pytest.mark.slow),
        pytest.param("flat", 2_000_000, 5, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_in_vectors(kind, n, k):
    basis = 2 * k + 4
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(n), str(k)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    vectors = float(done.stdout)
    # Not less than the basis itself, or the measurement sees nothing; half a vector (4 MB) is the allocator's.
    assert basis < vectors < basis + 3 + k + 0.5
