"""Run ``python -m gendistill``."""

from __future__ import annotations

import sys

from gendistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
