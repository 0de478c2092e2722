"""The ways a command ends badly; exit status 1 or 2."""


class ConfigurationError(Exception):
    """Wrong use or configuration, found before anything starts: exit status 2.

    The message is one line that says what is wrong and what to do about it.
    """


class RunFailedError(Exception):
    """A run that began and cannot be trusted, e.g. counts that do not add up: exit status 1."""


class TransientError(RunFailedError):
    """Something outside refused for now, e.g. a broker or a disk: the slice may be tried again."""
