"""How errors of librdkafka are worded, and what to do about them, by their names."""

REPEAT_LOG_S = 30.0
"""Seconds before the same kind of error is logged again: librdkafka repeats itself many times a second."""

_REACH = "check kafka.brokers, and the network: nc -vz HOST PORT"
_FIXES = {
    "_AUTHENTICATION": "check sasl.mechanism, sasl.username and sasl.password in [kafka.settings]",
    "_SSL": "check ssl.ca.location and security.protocol in [kafka.settings], and the broker's certificate",
    # Brokers that expect TLS accept the connection and close it.
    "_ALL_BROKERS_DOWN": f"{_REACH}; if the brokers expect TLS, set security.protocol in [kafka.settings]",
    "_TRANSPORT": _REACH,
    "_TIMED_OUT": _REACH,
    "_RESOLVE": _REACH,
}


_HTTP = f"Invalid response size {int.from_bytes(b'HTTP')} "
"""What librdkafka says about the first bytes of a web server's response."""


def grant(what: str, rights: str) -> str:
    """Return the command that grants rights; `what` is the option that names the topic or group."""
    return f"kafka-acls.sh --add {rights} {what} --allow-principal User:NAME"


def may_not_write(topic: str) -> str:
    """Return that the user lacks the rights of a producer, with the fix."""
    return f"this user may not write to it: {grant(f'--topic {topic}', '--producer')}"


def is_tls(name: str, text: str) -> bool:
    """Return whether TLS failed; a peer that closes the connection in the handshake has another error code."""
    return name == "_SSL" or "SSL handshake failed" in text or "in state SSL_HANDSHAKE" in text


def fix(name: str, text: str) -> str:
    """Return the fix for an error by its name and text; empty if there is none to suggest."""
    if _HTTP in text:
        return "this port speaks HTTP, not Kafka: check kafka.brokers"
    return _FIXES.get("_SSL" if is_tls(name, text) else name, "")


def in_brackets(name: str, text: str) -> str:
    """Return the fix for an error as the end of a log line; empty if there is none to suggest."""
    return f" ({fix(name, text)})" if fix(name, text) else ""
