"""Whether this machine has PostgreSQL, as infra/services.sh looks for it."""

from __future__ import annotations

from pathlib import Path


def absent() -> str:
    """Why tests that need it are skipped; empty if it is here."""
    if list(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
        return ""
    return "no PostgreSQL here: sudo apt-get install -y --no-install-recommends postgresql"
