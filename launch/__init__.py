"""What runs before and around a job."""
