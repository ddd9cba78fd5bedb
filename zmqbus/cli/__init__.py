"""The command line. It only presents: what it shows comes from nodes."""
