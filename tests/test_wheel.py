"""What a stranger installs."""

import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow  # builds environments from a package index
def test_a_wheel_converts_without_torch_and_loads_with_it() -> None:
    script = Path(__file__).parents[1] / "scripts" / "check_wheel.sh"
    done = subprocess.run([script], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the wheel converts without torch, and loads with it\n")
