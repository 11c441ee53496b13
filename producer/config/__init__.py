"""The configuration: read from files, environment and options, merged, validated once."""
