"""Pipeline: the stages on a run folder; every command is one of these functions."""
