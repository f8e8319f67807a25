"""The hosts of a job: who they are, and what each says of itself."""
