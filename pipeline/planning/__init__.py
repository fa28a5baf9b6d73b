"""Memory, communication and time of a run before it is queued: arithmetic, and one step traced without data."""
