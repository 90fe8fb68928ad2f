"""What runs on the device: one file an operation, with its mathematics and its torch reference."""
