"""What to do about an error of librdkafka, by its name."""

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


def fix(name: str) -> str:
    """Return the fix for an error; empty if there is none to suggest."""
    return _FIXES.get(name, "")
