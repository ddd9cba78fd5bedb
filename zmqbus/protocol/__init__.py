"""The protocol, sans-IO: no sockets, files, threads or clocks. Methods take `now` and return what to do."""
