"""The settings of a run file or a run: where each comes from, where two differ, and the schema of all."""
