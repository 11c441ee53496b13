"""All errors that users see, each with its exit code, from sysexits.h where possible.

RebpfError            70 internal
├── Stopped            0 a signal arrived while waiting for a server or the compiler
├── UsageError        64 the command line is wrong
├── IncompleteError   65 data in the topics or on disk is incomplete or out of order
├── UnavailableError  69 this host or a server cannot do what is needed
│   └── HookError        no hook of a stream could be attached
├── OutputError       74 standard output cannot be written
│   └── ReaderGoneError 141 the reader of the output has exited, as shells report SIGPIPE
├── BusyError         75 another producer is running: retry later
├── PermissionDenied  77 a capability, or a right in Kafka or the registry, is missing
└── ConfigError       78 the configuration is wrong
    └── SchemaError      a schema is wrong, or the registry rejects it
"""

from collections.abc import Sequence


class RebpfError(Exception):
    """An error that ends the command. Its text includes the fix; `details` are further lines."""

    exit_code = 70
    details: Sequence[str] = ()


class Stopped(RebpfError):
    """A signal arrived while waiting for a server or the compiler, so the command ends as requested."""

    exit_code = 0


class UsageError(RebpfError):
    """The command line is wrong."""

    exit_code = 64


class IncompleteError(RebpfError):
    """Data in the topics or on disk is incomplete or out of order."""

    exit_code = 65


class UnavailableError(RebpfError):
    """This host or a server cannot do what is needed."""

    exit_code = 69


class HookError(UnavailableError):
    """No hook of a stream could be attached."""


class OutputError(RebpfError):
    """Standard output, or the file of `trace -w`, cannot be written."""

    exit_code = 74


class ReaderGoneError(OutputError):
    """The reader of the output has exited. The exit code is the one that shells report for SIGPIPE."""

    exit_code = 141


class BusyError(RebpfError):
    """Another producer is running with the same state folder or pins."""

    exit_code = 75


class PermissionDenied(RebpfError):
    """A capability, or a right in Kafka or the registry, is missing."""

    exit_code = 77


class ConfigError(RebpfError):
    """The configuration is wrong."""

    exit_code = 78


class SchemaError(ConfigError):
    """A schema cannot be used, or the registry rejects it."""
