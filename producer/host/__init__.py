"""The host that the producer runs on: state folder, cgroups, clocks, systemd, signals, output."""
