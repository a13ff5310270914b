"""`trainer=…`: who owns the weights and improves them. verl's FSDP2 engine behind the `PolicyTrainer` protocol."""
