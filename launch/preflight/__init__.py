"""What can be known before a job starts: faults, memory, time."""
