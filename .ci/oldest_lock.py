"""Print requirements.lock with the oldest supported torch in place of the locked one: `make test LOCK=oldest.lock`.

Everything else stays as it is locked, but for what torch itself asks for in versions of its own (CUDA's libraries,
triton, setuptools) and torchvision, which goes with it: pip chooses those.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOES_WITH_TORCH = re.compile(r"(torch|torchvision|triton|setuptools|nvidia-[\w-]+|cuda-[\w-]+)==")


def oldest_lock() -> str:
    """The lock's text; ValueError when pyproject.toml has no lower bound of torch."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]["dependencies"]
    bounds = [found.group(1) for text in dependencies if (found := re.match(r"torch>=([\d.]+)", text))]
    if len(bounds) != 1:
        raise ValueError(f"expected one dependency such as 'torch>=2.11' in pyproject.toml, got {dependencies}")
    lines = (ROOT / "requirements.lock").read_text("utf8").splitlines()
    kept = [line for line in lines if "==" in line and not GOES_WITH_TORCH.match(line)]
    return "\n".join([*kept, f"torch=={bounds[0]}.*", "torchvision", ""])


if __name__ == "__main__":
    sys.stdout.write(oldest_lock())
