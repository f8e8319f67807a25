"""What a run's folder tells: every run at a glance, and one run or several on a page."""
