"""What a run tells MLflow, over a spool on disk."""
