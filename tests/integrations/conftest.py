"""What needs transformers is collected where a version with all models is installed, and once: it
runs no kernels.
"""

import importlib.util
import os


def installed() -> bool:
    """Whether transformers has the newest of the models with KDA."""
    if importlib.util.find_spec("transformers") is None:
        return False
    return importlib.util.find_spec("transformers.models.bailing_hybrid") is not None


if os.environ.get("TRITON_INTERPRET") == "1" or not installed():
    collect_ignore_glob = ["test_transformers*.py"]
