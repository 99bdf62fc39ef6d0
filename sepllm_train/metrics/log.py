"""metrics.jsonl: one JSON object per line, the source of every plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from data_prep.files import write_whole


class MetricsLog:
    """Appends records to RUN/metrics.jsonl; the file is closed after each line, so a killed run loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Numbers that JSON does not have (nan, inf) become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.path, "a", encoding="utf8") as file:
            file.write(json.dumps(clean) + "\n")

    def rewind(self, step: int) -> None:
        """Keep the records up to `step`, which a resumed run will not write again, and drop a torn last line."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_whole(self.path, "".join(kept).encode())
