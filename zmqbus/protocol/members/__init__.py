"""Who is on the bus. Sans-IO."""
