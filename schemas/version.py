"""The version every artefact, archive file, alert and dead letter names."""

TOOL_VERSION = "0.1.0"
"""Version of deltawatch; the same as the distribution's."""
