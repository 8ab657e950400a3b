"""The stateful service: sessions of recurrent models behind gRPC."""
