"""Attention-sink statistics beside flash attention, with their exact gradient."""
