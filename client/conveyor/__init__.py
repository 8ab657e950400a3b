"""Client SDK of Conveyor: numpy in, numpy out, the state stays on the server."""
