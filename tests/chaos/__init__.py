"""What worlds of chaos have in common: processes that are killed, histories, verdicts, seeds."""
