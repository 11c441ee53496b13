"""Run Flink SQL files in one session with PyFlink: on a mini cluster in this process, or, with
--set execution.target=remote, on a cluster.

A statement ends with a semicolon at the end of a line. Each INSERT is a job, and run.py waits until it ends: never,
unless the tables have a bounded scan mode.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pyflink.table import EnvironmentSettings, TableEnvironment

_SET_BEGINS = "EXECUTE STATEMENT SET BEGIN"
_SETTING = re.compile(r"SET '([^']+)' = '([^']*)'")


def statements(text: str) -> Iterator[str]:
    """Split a file into statements, without comment lines. A statement set is one, up to its END."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("--"))
    opened = ""
    for statement in re.split(r";[ \t]*$", "\n".join(lines), flags=re.MULTILINE):
        opened += statement.strip()
        if opened.startswith(_SET_BEGINS) and opened.rsplit(None, 1)[-1] != "END":
            opened += ";\n"
        elif opened:
            yield opened + (";" if opened.startswith(_SET_BEGINS) else "")
            opened = ""


def run(session: TableEnvironment, statement: str) -> None:
    """Execute a statement; TableEnvironment does not support SET, so it is handled here."""
    if setting := _SETTING.fullmatch(statement):
        session.get_config().set(*setting.groups())
        return
    done = session.execute_sql(statement)
    if done.get_job_client():
        done.wait()


def main() -> None:
    """Open a session and run the files in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jars", type=Path, metavar="FOLDER", help="folder of the connectors' jars")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a Flink setting")
    parser.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    settings = dict(each.partition("=")[::2] for each in given.set)
    if given.jars:
        settings["pipeline.jars"] = ";".join(each.resolve().as_uri() for each in given.jars.glob("*.jar"))
    session = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
    for key, value in settings.items():
        session.get_config().set(key, value)
    for file in given.files:
        for statement in statements(file.read_text()):
            run(session, statement)


if __name__ == "__main__":
    sys.exit(main())
