"""Jobs: rendered as commands, run as sessions, started again."""
