"""Messages of containerd's gRPC API as far as nsfs speaks it: field tables of our own, stubs made by `make proto`."""
