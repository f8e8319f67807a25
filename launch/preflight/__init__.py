"""Checks and forecasts before a job starts: faults, memory, time."""
