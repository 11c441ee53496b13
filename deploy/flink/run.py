"""Run files of Flink SQL, one behind the other in one session, with PyFlink: on a mini cluster in this process, or with
--set execution.target=remote on a cluster.

In the files a statement ends where a line ends with a semicolon. Each INSERT is a job; run.py waits for its end,
and topics have none unless a table says so.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pyflink.table import EnvironmentSettings, TableEnvironment

_SETTING = re.compile(r"SET '([^']+)' = '([^']*)'")


def statements(text: str) -> Iterator[str]:
    """Split a file, and leave out lines that are comments."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("--"))
    for statement in re.split(r";[ \t]*$", "\n".join(lines), flags=re.MULTILINE):
        if stripped := statement.strip():
            yield stripped


def run(session: TableEnvironment, statement: str) -> None:
    """Execute a statement; TableEnvironment leaves SET to the SQL client, so it is done here."""
    if setting := _SETTING.fullmatch(statement):
        session.get_config().set(*setting.groups())
        return
    done = session.execute_sql(statement)
    if done.get_job_client():
        done.wait()


def main() -> None:
    """Open a session and run the files in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jars", type=Path, metavar="FOLDER", help="where the connectors' jars are")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of Flink")
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
