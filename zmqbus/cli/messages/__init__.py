"""Messages as people and programs see them: their fields, expressions on these, and forms to print. No sockets."""
