"""What needs transformers is collected where that is installed, and once: it runs no kernels."""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_transformers*.py"]
