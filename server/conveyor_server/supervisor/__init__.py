"""Several processes behind one gRPC port: who starts them, replaces them and ends them."""
