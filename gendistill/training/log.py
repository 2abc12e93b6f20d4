"""The metrics file: one JSON object per logged step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gendistill.errors import OutputError, TrainingError
from gendistill.paths import write_text, writing
from gendistill.records import read_metrics_file


class MetricLog:
    """The file ``metrics.jsonl``, without the rows past the step that training resumes from.

    Lines that cannot be read are moved to ``metrics.jsonl.broken``.

    Args:
        path: The file; made when missing.
        up_to: Steps finished; later rows and a half-written last line are removed.
        warn: Receives one line if lines cannot be read.
    """

    def __init__(self, path: Path, *, up_to: int, warn: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            metrics = read_metrics_file(path, error=OutputError)
            self.rows = [row for row in metrics.rows if row["step"] <= up_to]
            if metrics.broken:
                self._set_aside(metrics.broken, warn)
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _set_aside(self, lines: list[bytes], warn: Callable[[str], None] | None) -> None:
        kept = self.path.with_name(f"{self.path.name}.broken")
        with writing(kept), kept.open("ab") as file:
            file.writelines(line + b"\n" for line in lines)
        if warn is not None:
            count = "1 line" if len(lines) == 1 else f"{len(lines):,} lines"
            warn(
                f"{self.path}: {count} cannot be read, moved to {kept.name}; training does not depend on them"
            )

    def write(self, row: dict[str, Any]) -> None:
        """Append one row.

        Raises:
            TrainingError: A number in it is not finite.
            OutputError: The file cannot be written.
        """
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError as error:
            raise TrainingError(
                f"a figure of step {row['step']} is not finite: {json.dumps(row)}",
                where=str(self.path),
                hint="lower the stage's lr or grad_clip; the checkpoints before this step are intact",
            ) from error
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.rows.append(row)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every row that can be read; a kill can leave a last line without its end."""
    return read_metrics_file(path, error=OutputError).rows
