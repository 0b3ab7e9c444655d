"""`recap bench serve`: the policy service beside other servers, on the same observations."""
