"""Makes the model server importable: it is a project of its own and not installed here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "model-server" / "src"))
