"""`zmqbus pub` (pub.py) and `zmqbus sub` (sub.py): publish values or lines, and print what is published."""
