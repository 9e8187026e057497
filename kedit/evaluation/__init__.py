"""What is asked of an edited model."""
