#!/usr/bin/env python3
"""`kubectl create configmap --from-file=KEY=PATH... --dry-run=client`, for machines without kubectl."""

import json
import sys
from pathlib import Path

pairs = [
    a.removeprefix("--from-file=").split("=", 1) for a in sys.argv if a.startswith("--from-file=")
]
data = {key: Path(path).read_text() for key, path in pairs}
print(
    json.dumps(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": sys.argv[3]}, "data": data}
    )
)
