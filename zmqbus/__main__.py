"""`python -m zmqbus` is the same as `zmqbus`."""

from zmqbus.cli import main

if __name__ == "__main__":
    main()
