"""The dispatcher: each rule by itself, and any sequence of events against a simple model."""
