"""End a script of this checkout with one sentence where its environment cannot run it. Scripts import it first.

The package that is installed may be another checkout's: this one's checks are loaded by their path.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

spec = spec_from_file_location("_requirements", str(ROOT / "sepllm_train" / "requirements.py"))
assert spec is not None and spec.loader is not None
requirements = module_from_spec(spec)
spec.loader.exec_module(requirements)
requirements.end_if_unsound(ROOT)
