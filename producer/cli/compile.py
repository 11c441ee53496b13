"""`rebpf compile`: programs for hosts without a compiler."""

from pathlib import Path

import click

from producer.cli.options import Command, FilePath, option
from producer.host.output import echo


@click.command(
    cls=Command,
    examples=(
        ("rebpf compile -o 6.1.0-50-amd64", "Compile for hosts with this host's kernel"),
        ("rebpf compile --btf vmlinux-6.1.0-50 -o 6.1.0-50-amd64", "Compile for another kernel"),
    ),
)
@option(
    "--btf",
    type=FilePath(),
    help="The kernel's types: its /sys/kernel/btf/vmlinux, or an uncompressed vmlinux.  [default: this kernel's]",
)
@option("--output", "-o", required=True, type=FilePath(), help="File to write, for capture.programs of the hosts.")
def compile(btf: Path | None, output: Path) -> None:
    """Compile the BPF programs for hosts without bcc.

    Needs bcc and root. The hosts may have another processor architecture. The file has the programs of all streams
    and hooks. A host uses it if its kernel has the same structs and features, and its ReBPF has the same BPF source;
    `rebpf check` shows whether it does.
    """
    from producer.commands.compile import compile_programs

    echo(compile_programs(btf, output))
