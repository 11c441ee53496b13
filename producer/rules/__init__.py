"""Which connections are captured: rules resolved to numbers, the tables that the kernel decides by, and `--explain`."""
