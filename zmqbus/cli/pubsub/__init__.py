"""`zmqbus pub` (pub.py), `zmqbus sub` (sub.py) and `zmqbus tap` (tap/): publish, print what is published, look on."""
