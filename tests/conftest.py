"""Settings of every test: offline, quiet, single-threaded enough to be deterministic."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One folder a process for the copies that evaluate and transformers make of modules they load: a package of copies
# is found in the folder of its first import only, and workers that share one delete each other's.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).parent))
