"""The command line, and everything that runs before and around a job."""
