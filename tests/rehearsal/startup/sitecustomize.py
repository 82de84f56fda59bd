"""Python runs this at its start where the folder is on PYTHONPATH: in every process of a rehearsal."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import granted

granted.install()
