"""Lines of other libraries that are left out, and all others that stay."""

from __future__ import annotations

import os
import subprocess
import sys

SAID = """
import logging, os, warnings
from lightning_edge.quiet import quiet_libraries
quiet_libraries()
quiet_libraries()
logging.basicConfig(format="%(message)s")
ours = [len(logging.getLogger(name).filters) for name in (None, "torchao", "torch.utils._pytree")]
assert ours == [1, 1, 1], ours
logging.getLogger("torchao").warning("Failed to load x.so: Could not load this library: x.so")
logging.getLogger("torchao").warning("torchao stays")
logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass and is now", "Kind")
logging.warning("Your model is converted in training mode.")
logging.warning("root stays")
warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", FutureWarning)
warnings.warn("a warning stays", FutureWarning)
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
"""


def test_lines_are_left_out_by_their_words_and_all_others_stay() -> None:
    # Other tests import TensorFlow's parts, which set a level of their own.
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    run = subprocess.run([sys.executable, "-c", SAID], capture_output=True, text=True, check=True, env=environment)
    lines = run.stderr.splitlines()
    assert [line for line in lines if line in ("torchao stays", "root stays")] == ["torchao stays", "root stays"]
    assert "a warning stays" in run.stderr
    assert not [line for line in lines if "library" in line or "Enum" in line or "training" in line or "Leaf" in line]
    assert run.stdout.split() == ["1"]


def test_the_users_own_level_of_notes_stays() -> None:
    code = "import os; from lightning_edge.quiet import quiet_libraries; quiet_libraries(); "
    code = f"import os; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '0'; {code} print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
