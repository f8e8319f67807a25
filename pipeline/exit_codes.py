"""Exit codes of a training process and of the job that it belongs to; 0 is success, 1 any other failure."""

from data_prep.errors import UserError

USER_ERROR = UserError.exit_code
"""Something that a person can fix, said in plain lines; a restart would meet it again."""
PREEMPTED = 75
"""Asked to stop, and everything is saved; start the job again to go on."""
HANG = 76
"""A rank hung and was ended; start the job again."""
