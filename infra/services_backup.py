"""The tracker's databases and artifacts, saved to a folder or to S3 and brought back. Called by infra/services.sh.

A backup is a folder `mshnet-YYYYMMDDTHHMMSSZ` with a dump of each database, the files, and manifest.json, which names
each with its size and SHA-256. The manifest is written last: a folder without one is no backup.

What is saved is of one piece. MLflow's files are written before the rows that point to them and are not changed later,
so the databases are dumped first and the files copied afterwards: each file that a dumped row points to is there.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import psycopg2

FORMAT = 1
# The tracker's own first: a run whose permissions are younger than it is no harm, the reverse would be.
DATABASES = ("mlflow", "mlflow_auth")
ARTIFACTS = "artifacts"
NAME = re.compile(r"mshnet-\d{8}T\d{6}Z")
THREADS = 8


@dataclass(frozen=True)
class Place:
    """A folder of files, on disk or in S3."""

    files: Any  # an fsspec file system
    root: str

    @classmethod
    def of(cls, uri: str, own_store: str | None = None) -> Place:
        """The place that a URI names; `own_store` is the folder with the profile of this machine's object store."""
        options: dict[str, Any] = {}
        if uri.startswith("s3://") and own_store:
            options = _profile(Path(own_store))
        files, root = fsspec.url_to_fs(uri, **options, **({"use_listings_cache": False} if "s3://" in uri else {}))
        return cls(files, root.rstrip("/"))

    def at(self, path: str) -> str:
        """The whole path of a file in it."""
        return f"{self.root}/{path}"

    def paths(self) -> list[str]:
        """All files below, relative and sorted."""
        if not self.files.exists(self.root):
            return []
        return sorted(found[len(self.root) + 1 :] for found in self.files.find(self.root))

    def put(self, source: Path, path: str) -> None:
        """Write a file of this machine."""
        if "file" in self.files.protocol:
            Path(self.at(path)).parent.mkdir(parents=True, exist_ok=True)
        self.files.put_file(str(source), self.at(path))

    def get(self, path: str, target: Path) -> None:
        """Read one to this machine."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.files.get_file(self.at(path), str(target))

    def remove(self) -> None:
        """All of it."""
        if self.files.exists(self.root):
            self.files.rm(self.root, recursive=True)

    def move(self, root: str) -> None:
        """All of it to another place beside it."""
        if "file" in self.files.protocol:
            os.rename(self.root, root)
            return
        for path in self.paths():
            self.files.cp_file(self.at(path), f"{root}/{path}")
        self.remove()

    def __truediv__(self, name: str) -> Place:
        return Place(self.files, self.at(name))


def _profile(folder: Path) -> dict[str, Any]:
    settings = configparser.ConfigParser()
    settings.read([folder / "config", folder / "credentials"])
    (account,) = (name for name in settings.sections() if not name.startswith("profile "))
    return {
        "key": settings[account]["aws_access_key_id"],
        "secret": settings[account]["aws_secret_access_key"],
        "client_kwargs": {
            "endpoint_url": settings[f"profile {account}"]["endpoint_url"],
            "region_name": settings[f"profile {account}"]["region"],
        },
    }


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- backup ---


def backup(options: argparse.Namespace) -> None:
    """Save; then remove what was not finished and what is older than the kept ones."""
    destination = Place.of(options.destination)
    name = time.strftime("mshnet-%Y%m%dT%H%M%SZ", time.gmtime())
    target = destination / name
    if target.paths():
        sys.exit(f"'{target.root}' is there already; try again in a second")
    trees = {ARTIFACTS: options.artifacts, **{f"more-{i}": uri for i, uri in enumerate(options.more)}}
    files: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for database in DATABASES:
            dump = Path(scratch) / f"{database}.dump"
            _postgres(options, "pg_dump", "--format=custom", f"--file={dump}", database)
            files[dump.name] = fingerprint(dump)
            target.put(dump, dump.name)
        for folder, uri in trees.items():
            files |= dict(_copy(Place.of(uri, options.own_store), target / folder, folder, Path(scratch)))
        manifest = Path(scratch) / "manifest.json"
        manifest.write_text(
            json.dumps({"format": FORMAT, "made": name, "trees": trees, "files": files}, indent=1, sort_keys=True)
        )
        target.put(manifest, ".manifest.json.new" if "file" in target.files.protocol else "manifest.json")
        if "file" in target.files.protocol:
            os.replace(target.at(".manifest.json.new"), target.at("manifest.json"))
    kept = _tidy(destination, name, options.kept)
    size = sum(file["bytes"] for file in files.values())
    print(f"{options.destination.rstrip('/')}/{name}: {len(files)} files, {size / 2**20:.1f} MiB; kept here: {kept}")


def _copy(source: Place, target: Place, folder: str, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    def copy(numbered: tuple[int, str]) -> tuple[str, dict[str, Any]] | None:
        number, path = numbered
        local = scratch / f"{folder}-{number}"
        try:
            source.get(path, local)
        except FileNotFoundError:  # removed since it was listed
            return None
        try:
            target.put(local, path)
            return f"{folder}/{path}", fingerprint(local)
        finally:
            local.unlink()

    with ThreadPoolExecutor(THREADS) as pool:
        yield from filter(None, pool.map(copy, enumerate(source.paths())))


def _tidy(destination: Place, newest: str, kept: int) -> int:
    found = [
        name for path in destination.files.ls(destination.root, detail=False) if NAME.fullmatch(name := _last(path))
    ]
    whole = sorted(name for name in found if destination.files.exists((destination / name).at("manifest.json")))
    for name in set(found) - set(whole[-kept:]):
        if name <= newest:  # another backup may be under way
            (destination / name).remove()
    return min(len(whole), kept)


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


# --- restore ---


def look(options: argparse.Namespace) -> list[str]:
    """Refuse what `restore` would refuse, as long as the tracker still runs. Returns what is there already."""
    _, manifest = _find(Place.of(options.source))
    occupied = _occupied(options, _targets(options, manifest))
    if occupied and not options.replace:
        sys.exit(f"there is something already: {', '.join(occupied)}; to put it aside and restore: --replace")
    return occupied


def restore(options: argparse.Namespace) -> None:
    """Check all of it, bring it back beside what is there, then put it in its place."""
    occupied = look(options)
    source, manifest = _find(Place.of(options.source))
    targets = _targets(options, manifest)
    aside = f"before_{time.strftime('%Y%m%dt%H%M%Sz', time.gmtime())}"
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        local = _fetch_and_check(source, manifest, Path(scratch))
        for database in DATABASES:
            _administer(options, f"DROP DATABASE IF EXISTS {database}_restored", f"CREATE DATABASE {database}_restored")
            dump = local / f"{database}.dump"
            _postgres(options, "pg_restore", "--exit-on-error", f"--dbname={database}_restored", str(dump))
        for folder, target in targets.items():
            if target.paths():
                target.move(f"{target.root}.{aside}")
                print(f"what was in {target.root} is in {target.root}.{aside} now")
            paths = [path[len(folder) + 1 :] for path in manifest["files"] if path.startswith(f"{folder}/")]
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda path: target.put(local / folder / path, path), paths))  # noqa: B023
        with closing(_connect(options)) as connection, connection, connection.cursor() as sql:  # all or none
            for database in DATABASES:
                sql.execute(f"ALTER DATABASE {database} RENAME TO {database}_{aside}")
                sql.execute(f"ALTER DATABASE {database}_restored RENAME TO {database}")
    if occupied:
        print(f"the databases that were there are {', '.join(f'{name}_{aside}' for name in DATABASES)} now")
    else:
        _administer(options, *(f"DROP DATABASE {name}_{aside}" for name in DATABASES))
    print(f"restored {source.root}: {len(manifest['files'])} files")


def _targets(options: argparse.Namespace, manifest: Mapping[str, Any]) -> dict[str, Place]:
    return {
        folder: Place.of(options.artifacts if folder == ARTIFACTS else uri, options.own_store)
        for folder, uri in manifest["trees"].items()
    }


def _find(place: Place) -> tuple[Place, dict[str, Any]]:
    """The backup itself, or the newest in a folder of backups."""
    if not place.files.exists(place.at("manifest.json")):
        listed = place.files.ls(place.root, detail=False) if place.files.exists(place.root) else []
        names = sorted(name for path in listed if NAME.fullmatch(name := _last(path)))
        whole = [name for name in names if place.files.exists((place / name).at("manifest.json"))]
        if not whole:
            sys.exit(f"no backup in '{place.root}' (looked for manifest.json and mshnet-*/manifest.json)")
        place = place / whole[-1]
    manifest = json.loads(place.files.cat_file(place.at("manifest.json")))
    if manifest.get("format") != FORMAT:
        sys.exit(f"'{place.root}' has format {manifest.get('format')}, this version reads {FORMAT}")
    return place, manifest


def _fetch_and_check(source: Place, manifest: Mapping[str, Any], scratch: Path) -> Path:
    local = Path(source.root) if "file" in source.files.protocol else scratch

    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        path, expected = item
        if ".." in Path(path).parts or Path(path).is_absolute():
            return f"{path} (leads out of the folder)"
        try:
            if local is scratch:
                source.get(path, local / path)
            return None if fingerprint(local / path) == expected else f"{path} (not what was saved)"
        except FileNotFoundError:
            return f"{path} (absent)"

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = list(filter(None, pool.map(check, manifest["files"].items())))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        sys.exit(f"'{source.root}' is damaged, nothing was changed: {', '.join(wrong[:3])}{more}")
    return local


def _occupied(options: argparse.Namespace, targets: Mapping[str, Place]) -> list[str]:
    with closing(_connect(options, "mlflow")) as connection, connection.cursor() as sql:
        counted = []
        for table, own in (("runs", 0), ("registered_models", 0), ("experiments", 1)):  # MLflow makes one itself
            sql.execute("SELECT to_regclass(%s)", (table,))
            if sql.fetchone() != (None,):
                sql.execute(f"SELECT count(*) FROM {table}")
                ((count,),) = sql.fetchall()
                counted += [f"{count} {table}"] * (count > own)
    return counted + [
        f"{len(paths)} files in {target.root}" for target in targets.values() if (paths := target.paths())
    ]


# --- PostgreSQL ---


def _connect(options: argparse.Namespace, database: str = "postgres") -> Any:
    return psycopg2.connect(host=options.socket, user="mshnet", dbname=database)


def _administer(options: argparse.Namespace, *statements: str) -> None:
    with closing(_connect(options)) as connection:
        connection.autocommit = True
        with connection.cursor() as sql:
            for statement in statements:
                sql.execute(statement)


def _postgres(options: argparse.Namespace, program: str, *arguments: str) -> None:
    command = [f"{options.postgres_bin}/{program}", f"--host={options.socket}", "--username=mshnet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{program} failed:\n{done.stderr[-2000:]}")


def main() -> None:
    """`backup DESTINATION [URI...]` or `restore SOURCE [--replace]`."""
    parser = argparse.ArgumentParser()
    for name in ("postgres-bin", "socket", "artifacts", "scratch"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--own-store", default=None)
    parser.add_argument("--kept", type=int, default=7)
    verbs = parser.add_subparsers(required=True)
    saving = verbs.add_parser("backup")
    saving.add_argument("destination")
    saving.add_argument("more", nargs="*")
    saving.set_defaults(do=backup)
    for verb, function in (("look", look), ("restore", restore)):
        bringing_back = verbs.add_parser(verb)
        bringing_back.add_argument("source")
        bringing_back.add_argument("--replace", action="store_true")
        bringing_back.set_defaults(do=function)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
