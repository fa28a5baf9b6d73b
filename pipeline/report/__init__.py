"""Tables and intervals: what the stages measured, in the form people read."""
