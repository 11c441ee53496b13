"""Settings of all tests."""

from hypothesis import settings

# No test fails because the machine is slow.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
