"""What peers say to each other, and the state machines of both ends. Bytes in, events out; no sockets."""
