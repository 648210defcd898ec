"""The fault matrix: every kind of process of a fleet, stopped, killed, raising or lying at every stage of an update."""
