"""A journal at work beside a loop: what waits for the disk is done by threads. For forwarders, and for outboxes."""
