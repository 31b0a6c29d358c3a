"""Makes the tiny models of the exporter tests importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))
