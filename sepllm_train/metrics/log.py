"""metrics.jsonl: one JSON object per line, the source of every plot."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to RUN/metrics.jsonl; each line is flushed, so a killed run loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._drop_torn_line()
        self.file = open(path, "a", encoding="utf8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Numbers that JSON does not have (nan, inf) become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()

    def rewind(self, step: int) -> None:
        """Drop the records after `step`: a resumed run writes them again."""
        lines = self.path.read_text(encoding="utf8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            self.file.close()
            aside = self.path.with_suffix(".partial")
            aside.write_text("".join(line + "\n" for line in kept), encoding="utf8")
            os.replace(aside, self.path)
            self.file = open(self.path, "a", encoding="utf8")

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _drop_torn_line(self) -> None:
        """Cut a last line that a kill left without its end."""
        if self.path.exists():
            text = self.path.read_bytes()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                os.truncate(self.path, whole)
