"""The exceptions that bad input raises."""


class SkinfastError(ValueError):
    """Input that cannot be used: a data folder, a run folder, a setting.

    The message is one line that says what is wrong and how to mend it. The command line prints
    that line and exits with 2; nothing that existed before is changed.
    """


class DivergedError(SkinfastError):
    """A training whose loss stopped being finite: its settings are at fault, not its data."""
