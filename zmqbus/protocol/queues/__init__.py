"""Queues, on the owner's side: which message goes to which worker, and what becomes of it. Sans-IO."""
