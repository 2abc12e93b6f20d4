"""The metrics file: one JSON object per logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gendistill.paths import write_text, writing


class MetricLog:
    """Append rows to ``metrics.jsonl``, after dropping those past the step that training resumes from.

    Args:
        path: The file; made when missing.
        up_to: Steps finished; later rows and a half-written last line are removed.
    """

    def __init__(self, path: Path, *, up_to: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= up_to] if path.exists() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.rows = kept

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every whole row; a kill can leave a last line without its end."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
