"""What a machine can run, estimated before anything is loaded."""
