"""All errors that reach a user, each with the exit code of sysexits.h that the process ends with.

RebpfError            70 internal
├── Stopped            0 a signal came while a start waited for a server
├── UsageError        64 the command line is wrong
├── IncompleteError   65 what lies in the topics or on disk is not whole, or not in order
├── UnavailableError  69 this host or a server cannot do what was asked
│   └── HookError        no hook of a stream could be attached
├── OutputError       74 standard output cannot be written
│   └── ReaderGoneError 141 the reader of the output has gone, as a shell shows SIGPIPE
├── BusyError         75 another producer runs on this host: try again later
├── PermissionDenied  77 a capability is missing
└── ConfigError       78 the configuration is wrong
    └── SchemaError      a schema is wrong, or the registry refuses it
"""


class RebpfError(Exception):
    """An error that ends the command; its text says what to do."""

    exit_code = 70


class Stopped(RebpfError):
    """A signal came while something waited for a server: the command ends as it was asked to."""

    exit_code = 0


class UsageError(RebpfError):
    """The command line is wrong."""

    exit_code = 64


class IncompleteError(RebpfError):
    """What lies in the topics or on disk is not whole, or not in order."""

    exit_code = 65


class UnavailableError(RebpfError):
    """This host or a server it needs cannot do what was asked."""

    exit_code = 69


class HookError(UnavailableError):
    """No hook of a stream could be attached."""


class OutputError(RebpfError):
    """Standard output cannot be written."""

    exit_code = 74


class ReaderGoneError(OutputError):
    """The reader of the output has gone: the status is what a shell shows of a process that SIGPIPE ended."""

    exit_code = 141


class BusyError(RebpfError):
    """Another producer runs on this host."""

    exit_code = 75


class PermissionDenied(RebpfError):
    """A capability is missing."""

    exit_code = 77


class ConfigError(RebpfError):
    """The configuration is wrong."""

    exit_code = 78


class SchemaError(ConfigError):
    """A schema cannot be used, or the registry refuses it."""
