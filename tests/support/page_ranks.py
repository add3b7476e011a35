"""What one rank of `tests/nn/test_parallel.py` runs: `python -m tests.support.page_ranks RANK WORLD
STORE`, the blocks of docs/parallel.md one after another, as a script under torchrun.
"""

import os
import re
import sys

from tests.support.processes import ROOT

if __name__ == "__main__":
    rank, world, store = sys.argv[1:]
    os.environ |= {
        "RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ["PAGE_PORT"],
    }
    page = (ROOT / "docs" / "parallel.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(compile("\n".join(blocks), "docs/parallel.md", "exec"), {"__name__": "page"})
    print(len(blocks))
