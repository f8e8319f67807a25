"""What `globallocal evaluate` shows and hands on: tables, JSON, a picture, lm-evaluation-harness."""
