"""`trainer=…`: owns the weights and trains them. verl's FSDP2 backend behind the `PolicyTrainer` protocol."""
