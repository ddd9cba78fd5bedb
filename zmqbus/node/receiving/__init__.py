"""The receiving path: from a socket to messages in the hands of whoever consumes."""
