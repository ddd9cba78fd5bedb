"""What others do for us, and we for them: queues, and requests."""
