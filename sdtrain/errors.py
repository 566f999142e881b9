"""The user's mistakes. Imports nothing, so that a command can say one before torch is there."""


class UserError(Exception):
    """The user's mistake, said in one paragraph that names the key to change. `exit_code` is what the command leaves with."""

    exit_code = 2


class DataError(UserError):
    """The data are not what the configuration says."""

    exit_code = 3


class DivergedError(UserError):
    exit_code = 4


class StorageError(UserError):
    """What should be written or read back is not there, not whole, or has no room."""

    exit_code = 5


class RankError(UserError):
    """One of several ranks hung, died or raised."""

    exit_code = 6
