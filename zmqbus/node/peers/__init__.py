"""The others: who is there, who wants what, and whom our SUBs are connected to. On the engine's loop."""
