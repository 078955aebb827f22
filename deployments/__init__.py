"""How restitch runs for a team."""
