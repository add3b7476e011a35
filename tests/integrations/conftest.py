"""What needs transformers or flash-linear-attention is collected where they are installed
(transformers with all models), and once: it runs no kernels.
"""

import importlib.util
import os


def installed() -> bool:
    """Whether transformers has the newest of the models with KDA."""
    if importlib.util.find_spec("transformers") is None:
        return False
    return importlib.util.find_spec("transformers.models.bailing_hybrid") is not None


once = os.environ.get("TRITON_INTERPRET") != "1"
collect_ignore_glob = []
if not once or not installed():
    collect_ignore_glob.append("test_transformers*.py")
if not once or importlib.util.find_spec("fla") is None:
    collect_ignore_glob.append("test_fla*.py")
