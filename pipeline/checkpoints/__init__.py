"""What lies on disk after a save: completeness markers, shard files, conversion. Never imports deepspeed."""
